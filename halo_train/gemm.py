"""8-bit matrix products with row scales: int8 by our own GEMM, float8 by those that PyTorch ships (cuBLASLt), or by our own
where they do not apply the scales and, on Hopper, for long products and short ones (csrc/product_bindings.cpp, ``takes_kernel``)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .quantize import Quantized
from .reuse import ones

MULTIPLE = 16
"""The float8 GEMM takes contracted and output dimensions that are multiples of 16; operands are padded to it."""


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype, fast_accum: bool = True) -> Tensor:
    """diag(a.scale) (a.data b.data^T) diag(b.scale).

    int8 products accumulate exactly.

    Args:
        a: data [M, K], scale [M], [] or, of e4m3, [ceil(K / SCALE_BLOCK), M]. b: data [N, K], scale [N], [] or,
            with such scales of a, [ceil(K / SCALE_BLOCK), ceil(N / SCALE_BLOCK)]. On a GPU K and N are multiples of 16.
        out_dtype: of the result.
        fast_accum: let a float8 GEMM keep its sums in the tensor core, with fewer bits than float32 (relative error 1.3e-3
            at a contraction of 4096, growing with its square root; docs/numerics.md, section 5).

    Returns:
        [M, N], not differentiable.

    Raises:
        ValueError: operands or scales that do not fit.
        RuntimeError: a float8 product on a GPU without float8 tensor cores.
    """
    return ops.scaled_matmul(a.data, b.data, a.scale, b.scale, out_dtype, fast_accum)


def matmul_rows(a: Quantized, b: Quantized, out_dtype: torch.dtype, fast_accum: bool = True) -> Tensor:
    """diag(a.scale) (a.data b.data), contracted over the rows of b: those have no scales, or a has them folded in.

    Args:
        a: data [M, N], scales as in :func:`matmul`. b: data [N, K]; one scale of all of it is applied, row scales are not.
        out_dtype, fast_accum: as in :func:`matmul`.

    Returns:
        [M, K], not differentiable.
    """
    return ops.matmul_rows(a.data, b.data, a.scale, scale_of_columns(b), out_dtype, fast_accum)


def scale_of_columns(b: Quantized) -> Tensor:
    """What a product over the rows of b multiplies its columns by: the scale of all of b, or ones, because row scales are folded into
    the other operand."""
    return ones(b.data.shape[1], b.scale) if b.scale.dim() else b.scale
