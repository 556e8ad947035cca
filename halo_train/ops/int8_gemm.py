"""The int8 matrix product with row scales on Hopper: a Triton kernel, because no library GEMM scales its int32 sums.

A persistent kernel, one thread block a multiprocessor: operands come through the tensor memory accelerator, sums stay in
int32 in registers, both scales are applied once at the end. 1.33 to 1.46 times as fast
as ``torch._int_mm`` on an H200 (docs/LOG.md), which writes int32 that three more passes would have to read.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

tl: Any = None
"""triton.language once the kernel is first needed: ``import halo_train`` does not load Triton."""


class Tiles(NamedTuple):
    """One configuration of the kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


_WIDE = Tiles(128, 256, 128, warps=8, stages=3)
"""Two warp groups with 128 sums a thread: the most that registers hold. The output tile (64 KiB in bfloat16) and three stages
of 48 KiB fill shared memory."""

_SQUARE = Tiles(128, 128, 128, warps=4, stages=4)
"""Twice as many tiles, for products that would leave multiprocessors idle."""

_GROUP = 8
"""Rows of tiles that are walked together, so that their operands are still in the L2 cache."""


def int8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """:func:`reference.int8_matmul` on a GPU.

    Args:
        a: [M, K], b: [N, K], int8; K and N multiples of 16. Copied where rows do not start at multiples of 16 bytes.
        scale_a: [M] or []; scale_b: [N] or [], float32.
        out_dtype: bfloat16, float16 or float32 run the kernel, float64 the reference.

    Returns:
        [M, N]; equal to the reference bit by bit.
    """
    a, b = (t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    if not _can_run(a, b, out_dtype):
        return reference.int8_matmul(a, b, scale_a, scale_b, out_dtype)
    c = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    if c.numel():
        _launch(a, b, c, scale_a.contiguous(), scale_b.contiguous())
    return c


def _is_aligned(t: Tensor) -> bool:
    """As the tensor memory accelerator and cuBLASLt want it."""
    return t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0


def _can_run(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> bool:
    # Rows of c have to be aligned as well; longer contractions could overflow int32.
    stored = out_dtype in (torch.bfloat16, torch.float16, torch.float32) and b.shape[0] % 16 == 0
    short = 0 < a.shape[1] <= reference.INT8_MAX_CONTRACTION
    return stored and short and a.shape[1] % 16 == 0 and _on_hopper(a.device.index)


@functools.cache
def _on_hopper(device: int) -> bool:
    found = importlib.util.find_spec("triton") is not None
    return found and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_kernels: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels: launched as they are, they take the host half the time of a launch through triton.jit, which looks for the
kernel by all arguments."""


def _launch(a: Tensor, b: Tensor, c: Tensor, scale_a: Tensor, scale_b: Tensor) -> None:
    jitted, descriptor = _jitted()
    (m, k), n, device = a.shape, b.shape[0], a.get_device()
    sms = _multiprocessors(device)
    tiles = _WIDE if -(-m // _WIDE.m) * -(-n // _WIDE.n) >= sms else _SQUARE
    # In halves, the output tile of 4-byte elements fits beside the stages.
    halves = 2 if c.element_size() == 4 and tiles is _WIDE else 1
    grid = (min(sms, -(-m // tiles.m) * -(-n // tiles.n)), 1, 1)
    arguments = (
        descriptor(a, a.shape, a.stride(), [tiles.m, tiles.k]),
        descriptor(b, b.shape, b.stride(), [tiles.n, tiles.k]),
        descriptor(c, c.shape, c.stride(), [tiles.m, tiles.n // halves]),
        *(scale_a, scale_b, m, n, k),
        *(tiles.m, tiles.n, tiles.k, _GROUP, sms, halves, scale_a.dim() == 1, scale_b.dim() == 1),
    )
    key = (device, tiles, c.dtype, scale_a.dim(), scale_b.dim())
    with torch.cuda.device(device) if torch.cuda.current_device() != device else nullcontext():
        if key in _kernels:
            _kernels[key][grid](*arguments)
        else:
            _kernels[key] = jitted[grid](*arguments, num_warps=tiles.warps, num_stages=tiles.stages)


@functools.cache
def _jitted() -> tuple[Any, Any]:
    """The jitted kernel and Triton's descriptor of a tensor."""
    import triton
    import triton.language
    from triton.tools.tensor_descriptor import TensorDescriptor

    global tl
    tl = triton.language
    # One kernel for all sizes, so that what decides is in the key of _kernels.
    scales = ["scale_a", "scale_b"]
    jitted = triton.jit(
        _int8_gemm_kernel, do_not_specialize=["m", "n", "k"], do_not_specialize_on_alignment=scales
    )
    return jitted, TensorDescriptor


def _int8_gemm_kernel(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    c_desc,
    scale_a,
    scale_b,
    m,
    n,
    k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COL_SCALES: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    # Flattened, the loads of a tile overlap the end of the tile before it.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        rows = min(tiles_m - first, GROUP)
        row = (first + tile % rows) * BM
        col = (tile % (GROUP * tiles_n)) // rows * BN
        total = tl.zeros((BM, BN), dtype=tl.int32)
        for step in range(tl.cdiv(k, BK)):
            a = a_desc.load([row, step * BK])
            b = b_desc.load([col, step * BK])
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        c = total.to(tl.float32)
        if ROW_SCALES:
            i = row + tl.arange(0, BM)
            c = c * tl.load(scale_a + i, mask=i < m, other=0.0)[:, None]
        else:
            c = c * tl.load(scale_a)
        if COL_SCALES:
            j = col + tl.arange(0, BN)
            c = c * tl.load(scale_b + j, mask=j < n, other=0.0)[None, :]
        else:
            c = c * tl.load(scale_b)
        c = c.to(c_desc.dtype)
        if HALVES == 1:
            c_desc.store([row, col], c)
        else:
            left, right = tl.split(tl.permute(tl.reshape(c, (BM, 2, BN // 2)), (0, 2, 1)))
            c_desc.store([row, col], left)
            c_desc.store([row, col + BN // 2], right)
