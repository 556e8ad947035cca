"""The backward of an RMSNorm whose readers' gradients come apart: their sum, dx and the gain's gradient in one Triton kernel.

PyTorch's own takes one gradient, so that the sum is written and read first, and x and the sum are read twice. Rows are dealt
out to thread blocks, each of which keeps its part of the gain's gradient in registers.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from . import fused_reference

tl: Any = None
"""triton.language once the kernel is first needed: ``import halo_train`` does not load Triton."""

MAX_GRADIENTS = 3
"""That the kernel sums: of q, k and v."""

_MAX_WIDTH = 16384
"""A row of float32 and the sums of the gain's gradient are held in registers."""

_PROGRAMS = 2
"""Thread blocks a multiprocessor: more of them hide the wait for the sum over a row, and leave more parts to add up."""


def rms_norm_backward(
    dys: list[Tensor], x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`fused_reference.rms_norm_backward` on a GPU.

    Runs the kernel for up to :data:`MAX_GRADIENTS` gradients of rows up to 16384 wide in 16 or 32 bits, else the reference.
    """
    if not _can_run(dys, x):
        return fused_reference.rms_norm_backward(dys, x, weight, rstd)
    m, k = x.shape
    dys = [dy.contiguous() for dy in dys]
    x, dx = x.contiguous(), x.new_empty(m, k)
    programs = min(m, _PROGRAMS * _multiprocessors(x.device.index))
    parts = x.new_empty((programs, k), dtype=torch.float32)
    block = 1 << (k - 1).bit_length()
    with torch.cuda.device(x.device):
        _compiled()[(programs,)](
            dys[0],
            dys[min(1, len(dys) - 1)],
            dys[-1],
            x,
            x if weight is None else weight.contiguous(),
            rstd.contiguous(),
            dx,
            parts,
            m,
            k,
            COUNT=len(dys),
            HAS_WEIGHT=weight is not None,
            BLOCK=block,
            PROGRAMS=programs,
            num_warps=min(max(block // 512, 4), 32),
        )
    return dx, parts.sum(0)


def _can_run(dys: list[Tensor], x: Tensor) -> bool:
    narrow = all(t.dtype != torch.float64 for t in (*dys, x))
    return (
        narrow and len(dys) <= MAX_GRADIENTS and x.numel() > 0 and x.shape[1] <= _MAX_WIDTH and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _compiled() -> Any:
    import triton
    import triton.language

    global tl
    tl = triton.language
    return triton.jit(_rms_norm_backward_kernel)


def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    first,
    second,
    third,
    x,
    weight,
    rstd,
    dx,
    parts,
    m,
    k,
    COUNT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    inside = j < k
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, m, PROGRAMS):
        at = tl.cast(row, tl.int64) * k + j
        dy = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 1:
            dy += tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 2:
            dy += tl.load(third + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
        total += dy * unit
        if HAS_WEIGHT:
            dy = dy * tl.load(weight + j, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(dy * unit, axis=0) / k
        tl.store(dx + at, ((dy - unit * mean) * r).to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + program * k + j, total, mask=inside)
