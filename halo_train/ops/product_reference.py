"""In plain PyTorch, as in :mod:`halo_train.ops.reference`, the products that round an operand before or rotate the result after."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .block_reference import quantize_grad_blocks, quantize_tiles
from .reference import (
    hadamard,
    matmul_rows,
    quantize_grad,
    quantize_rows,
    quantize_rows_transposed,
    scaled_matmul,
)


def matmul_weight_rows(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_matmul` of a [M, K] by :func:`quantize_rows` of the weight [N, K], in the 8-bit dtype of a: [M, N], and the
    scales of the weight [N]."""
    data, scale = quantize_rows(weight, a.dtype, block, col_scale)
    return scaled_matmul(a, data, scale_a, scale, out_dtype), scale


def matmul_weight_columns(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> Tensor:
    """:func:`scaled_matmul` of a [M, N] by :func:`quantize_rows_transposed` of the weight [N, K] and row_scale [N], in ``dtype``, or by
    :func:`quantize_tiles`, then without row_scale, where scale_a has a value for each block: [M, K]."""
    if scale_a.dim() == 2:
        data, scale = quantize_tiles(weight, dtype)
    else:
        data, scale = quantize_rows_transposed(weight, dtype, row_scale)
    return scaled_matmul(a, data, scale_a, scale, out_dtype)


def matmul_rounded(
    x: Tensor,
    x_col_scale: Tensor | None,
    weight: Tensor,
    weight_col_scale: Tensor | None,
    dtype: torch.dtype,
    block: int,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
    columns: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`matmul_weight_rows` of :func:`quantize_rows` of x [M, K]: [M, N], then data [M, K] and scales [M] of x, an empty tensor, and the
    scales of the weight [N]. With ``columns`` the data [K, M] and, in place of the empty tensor, the scales of :func:`quantize_tiles` of
    x with the scales as divisors."""
    data, scale = quantize_rows(x, dtype, block, x_col_scale)
    y, weight_scale = matmul_weight_rows(data, scale, weight, block, weight_col_scale, out_dtype)
    kept, tiles = quantize_tiles(x, dtype, scale) if columns else (data, scale.new_empty(0))
    return y, kept, scale, tiles, weight_scale


def matmul_gradients(
    e: Tensor,
    e_col_scale: Tensor | None,
    weight: Tensor,
    weight_row_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    x_col_scale: Tensor,
    grad_dtype: torch.dtype,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    column_sums: bool,
    fast_accum: bool = True,
    blocks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`quantize_grad`, or with ``blocks`` :func:`quantize_grad_blocks`, of e [M, N] with e_col_scale and x_scale:
    :func:`matmul_weight_columns` of the rows, in the dtype of x, to
    [M, K] of ``out_dtype``; :func:`matmul_rotated` of the columns by the rows of x [M, K], or where x_col_scale has a value for each tile
    by x [K, M], x_col_scale and col_scale, to [N, K] in the dtype of the weight; the sums."""
    rounding = quantize_grad_blocks if blocks else quantize_grad
    rows, row_scales, columns, column_scales, sums = rounding(
        e, grad_dtype, e_col_scale, x_scale, column_sums
    )
    dx = matmul_weight_columns(rows, row_scales, weight, weight_row_scale, x.dtype, out_dtype)
    by_rows = x_col_scale.dim() < 2
    dw = matmul_rotated(columns, x, column_scales, x_col_scale, by_rows, block, col_scale, weight.dtype)
    return dx, dw, sums


def matmul_rotated(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    rows: bool,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> Tensor:
    """:func:`scaled_matmul`, or with ``rows`` :func:`matmul_rows`, rounded to ``out_dtype``, then rotated along its rows and times
    col_scale [N], rounded again."""
    y = (matmul_rows if rows else scaled_matmul)(a, b, scale_a, scale_b, out_dtype)
    return hadamard(y, block, 1.0 / math.sqrt(block), None, col_scale)
