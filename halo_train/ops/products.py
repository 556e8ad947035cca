"""The 8-bit matrix products as functions that check their arguments; those of float64 or unrounded values are the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import check_matrix, check_product, check_vector
from .registry import overloads


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool = True
) -> Tensor:
    """diag(scale_a) (a b^T) diag(scale_b); see :func:`reference.scaled_matmul`. Not differentiable.

    Raises:
        ValueError: operands that are no matrices with the same number of columns, scales of other lengths.
        RuntimeError: a float8 product on a GPU without float8 tensor cores.
    """
    check_product("scaled_matmul", a, b, scale_a, scale_b)
    if not _has_kernel(a, out_dtype):
        return reference.scaled_matmul(a, b, scale_a, scale_b, out_dtype)
    return overloads.scaled_matmul(a, b, scale_a, scale_b, out_dtype, fast_accum)


def matmul_rows(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool = True
) -> Tensor:
    """diag(scale_a) (a b) diag(scale_b), contracted over the rows of b; see :func:`reference.matmul_rows`. Not differentiable."""
    check_product("matmul_rows", a, b, scale_a, scale_b, rows=True)
    if not _has_kernel(a, out_dtype):
        return reference.matmul_rows(a, b, scale_a, scale_b, out_dtype)
    return overloads.matmul_rows(a, b, scale_a, scale_b, out_dtype, fast_accum)


def matmul_weight_rows(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_matmul` by what ``quantize_rows`` makes of a weight, and its scales; see
    :func:`reference.matmul_weight_rows`."""
    check_matrix("matmul_weight_rows", weight, block, col_scale)
    check_product("matmul_weight_rows", a, weight, scale_a, None)
    if not _has_kernel(a, out_dtype) or weight.dtype == torch.float64:
        return reference.matmul_weight_rows(a, scale_a, weight, block, col_scale, out_dtype)
    return overloads.matmul_weight_rows(a, scale_a, weight, block, col_scale, out_dtype, fast_accum)


def matmul_weight_columns(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> Tensor:
    """:func:`scaled_matmul` by what ``quantize_rows_transposed`` makes of a weight; see
    :func:`reference.matmul_weight_columns`."""
    check_matrix("matmul_weight_columns", weight, 1, None)
    check_product("matmul_weight_columns", a, weight, scale_a, None, rows=True)
    if row_scale is not None:
        check_vector("matmul_weight_columns", "row_scale", row_scale, weight.shape[0], weight)
    if not _has_kernel(a, out_dtype) or weight.dtype == torch.float64:
        return reference.matmul_weight_columns(a, scale_a, weight, row_scale, dtype, out_dtype)
    return overloads.matmul_weight_columns(a, scale_a, weight, row_scale, dtype, out_dtype, fast_accum)


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
    """:func:`scaled_matmul`, or with ``rows`` :func:`matmul_rows`, rounded, then rotated and scaled by columns; see
    :func:`reference.matmul_rotated`."""
    check_product("matmul_rotated", a, b, scale_a, scale_b, rows)
    if col_scale is not None:
        check_vector("matmul_rotated", "col_scale", col_scale, b.shape[1 if rows else 0], a)
    if not _has_kernel(a, out_dtype):
        return reference.matmul_rotated(a, b, scale_a, scale_b, rows, block, col_scale, out_dtype)
    return overloads.matmul_rotated(a, b, scale_a, scale_b, rows, block, col_scale, out_dtype, fast_accum)


def _has_kernel(a: Tensor, out_dtype: torch.dtype) -> bool:
    return a.dtype in reference.QMAX and out_dtype != torch.float64
