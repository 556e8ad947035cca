"""8-bit matrix products with row scales: float8 by the GEMMs that PyTorch ships (cuBLASLt), int8 by our own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import ops
from .ops import reference
from .quantize import Quantized

MULTIPLE = 16
"""The float8 GEMM takes contracted and output dimensions that are multiples of 16; operands are padded to it."""

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, fast_accum: bool = True) -> Tensor:
    """diag(a.scale) (a.data b.data^T) diag(b.scale).

    int8 products accumulate exactly.

    Args:
        a: data [M, K], scale [M] or []. b: data [N, K], scale [N] or []. On a GPU K and N are multiples of 16.
        out_dtype: of the result.
        fast_accum: let a float8 GEMM keep its sums in the tensor core, with fewer bits than float32 (relative error 1.3e-3
            at a contraction of 4096, growing with its square root; docs/numerics.md, section 5).

    Returns:
        [M, N], not differentiable.

    Raises:
        RuntimeError: a float8 product on a GPU without float8 tensor cores.
    """
    if a.data.dtype == torch.int8:
        return ops.int8_matmul(a.data, b.data, a.scale, b.scale, out_dtype)
    if a.data.is_cuda and a.data.dtype in _FLOAT8:
        return _float8_cuda(a, b, out_dtype, fast_accum)
    return reference.scaled_matmul(a.data, b.data, a.scale, b.scale, out_dtype)


def matmul_rows(a: Quantized, b: Quantized, out_dtype: torch.dtype, fast_accum: bool = True) -> Tensor:
    """diag(a.scale) (a.data b.data), contracted over the rows of b: those have no scales, or a has them folded in.

    Under torch.compile it is one operator: else the compiler transposes a weight in forward and keeps that until backward,
    when FSDP2 gathers the weight anyway.

    Args:
        a: data [M, N]. b: data [N, K]; one scale of all of it is applied, row scales are not.
        out_dtype, fast_accum: as in :func:`matmul`.

    Returns:
        [M, K], not differentiable.
    """
    product = _matmul_rows_op if torch.compiler.is_compiling() else _matmul_rows
    return product(a.data, a.scale, b.data, b.scale, out_dtype, fast_accum)


def _matmul_rows(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    data = Quantized(b, b_scale).transposed_data()
    scale = b_scale.new_ones(data.shape[0]) if b_scale.dim() else b_scale
    return matmul(Quantized(a, a_scale), Quantized(data, scale), out_dtype, fast_accum)


_matmul_rows_op = torch.library.custom_op("halo_train::matmul_rows", _matmul_rows, mutates_args=())


@_matmul_rows_op.register_fake
def _matmul_rows_fake(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _float8_cuda(a: Quantized, b: Quantized, out_dtype: torch.dtype, fast_accum: bool) -> Tensor:
    _check_float8_gpu(a.data.device.index)
    rows = a.scale.dim(), b.scale.dim()
    if out_dtype == torch.bfloat16 and rows == (1, 1):
        return _scaled_mm(a.data, b.data, a.scale.unsqueeze(1), b.scale.unsqueeze(0), out_dtype, fast_accum)
    if rows == (0, 0):
        # One scale a tensor: the GEMM writes every output dtype but float64.
        direct = torch.float32 if out_dtype == torch.float64 else out_dtype
        return _scaled_mm(a.data, b.data, a.scale, b.scale, direct, fast_accum).to(out_dtype)
    # The library applies row scales for bfloat16 output only; raw sums stay in float32 (float16 would overflow).
    one = torch.ones((), device=a.data.device)
    product = _scaled_mm(a.data, b.data, one, one, torch.float32, fast_accum)
    row = a.scale[:, None] if a.scale.dim() else a.scale
    return (product * row * b.scale).to(out_dtype)


def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=fast_accum)


@functools.cache
def _check_float8_gpu(device: int) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise RuntimeError(
            f"float8 products need a GPU of compute capability 8.9 or newer; got {torch.cuda.get_device_name(device)} "
            f"with {capability[0]}.{capability[1]}; use recipe='int8' or recipe='bf16'"
        )
