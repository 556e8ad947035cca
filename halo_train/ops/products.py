"""The 8-bit matrix products as functions that check their arguments; those of float64 or unrounded values are the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import product_reference, reference
from .checks import check_block_dtype, check_contracted, check_matrix, check_product, check_vector
from .registry import kernel_status, overloads


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
    :func:`product_reference.matmul_weight_rows`."""
    check_matrix("matmul_weight_rows", weight, block, col_scale)
    check_product("matmul_weight_rows", a, weight, scale_a, None)
    if not _has_kernel(a, out_dtype) or weight.dtype == torch.float64:
        return product_reference.matmul_weight_rows(a, scale_a, weight, block, col_scale, out_dtype)
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
    """:func:`scaled_matmul` by what ``quantize_rows_transposed`` makes of a weight, ``quantize_tiles`` for an a with scales for blocks; see
    :func:`product_reference.matmul_weight_columns`."""
    check_matrix("matmul_weight_columns", weight, 1, None)
    check_product("matmul_weight_columns", a, weight, scale_a, None, rows=True)
    if row_scale is not None:
        if scale_a.dim() == 2:
            raise ValueError(
                "matmul_weight_columns: row_scale must be None where scale_a has a value for each block, because the weight has one for "
                f"each tile; got {tuple(row_scale.shape)}; multiply the weight"
            )
        check_vector("matmul_weight_columns", "row_scale", row_scale, weight.shape[0], weight)
    if not _has_kernel(a, out_dtype) or weight.dtype == torch.float64:
        return product_reference.matmul_weight_columns(a, scale_a, weight, row_scale, dtype, out_dtype)
    return overloads.matmul_weight_columns(a, scale_a, weight, row_scale, dtype, out_dtype, fast_accum)


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
    """``quantize_rows`` of x and :func:`matmul_weight_rows`, with ``columns`` ``quantize_tiles`` of x, too; see
    :func:`product_reference.matmul_rounded`."""
    check_matrix("matmul_rounded", x, block, x_col_scale)
    check_matrix("matmul_rounded", weight, block, weight_col_scale)
    check_contracted("matmul_rounded", x, weight)
    if columns:
        check_block_dtype("matmul_rounded", dtype)
    arguments = (x, x_col_scale, weight, weight_col_scale, dtype, block, out_dtype, fast_accum, columns)
    if not _are_rounded_by_kernels(dtype, out_dtype, x, weight):
        return product_reference.matmul_rounded(*arguments)
    return overloads.matmul_rounded(*arguments)


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
    """``quantize_grad``, or with ``blocks`` ``quantize_grad_blocks``, :func:`matmul_weight_columns` of its rows and :func:`matmul_rotated` of
    its columns; see :func:`product_reference.matmul_gradients`.

    Raises:
        ValueError: shapes that do not fit; x by its columns without blocks.
    """
    op = "matmul_gradients"
    check_matrix(op, e, 1, e_col_scale)
    check_matrix(op, weight, block, col_scale)
    check_contracted(op, e, weight, rows=True)
    in_tiles = x_col_scale.dim() == 2
    wanted = (e.shape[0], weight.shape[1])
    wanted = wanted[::-1] if in_tiles else wanted
    if x.shape != wanted:
        raise ValueError(f"{op}: x must have shape {wanted}; got {tuple(x.shape)}")
    check_vector(op, "x_scale", x_scale, e.shape[0], e)
    if in_tiles:
        tiles = tuple(-(-size // reference.SCALE_BLOCK) for size in (e.shape[0], weight.shape[1]))
        if not blocks or tuple(x_col_scale.shape) != tiles:
            raise ValueError(
                f"{op}: x_col_scale of a matrix must have shape {tiles}, and blocks be True; got {tuple(x_col_scale.shape)} and {blocks}"
            )
    else:
        check_vector(op, "x_col_scale", x_col_scale, weight.shape[1], e)
    if weight_row_scale is not None:
        check_vector(op, "weight_row_scale", weight_row_scale, weight.shape[0], e)
    arguments = (
        *(e, e_col_scale, weight, weight_row_scale, x, x_scale, x_col_scale),
        *(grad_dtype, block, col_scale, out_dtype, column_sums, fast_accum, blocks),
    )
    if grad_dtype not in reference.QMAX or not _are_rounded_by_kernels(x.dtype, out_dtype, e, weight):
        return product_reference.matmul_gradients(*arguments)
    return overloads.matmul_gradients(*arguments)


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
    :func:`product_reference.matmul_rotated`."""
    check_product("matmul_rotated", a, b, scale_a, scale_b, rows)
    if col_scale is not None:
        check_vector("matmul_rotated", "col_scale", col_scale, b.shape[1 if rows else 0], a)
    if not _has_kernel(a, out_dtype):
        return product_reference.matmul_rotated(a, b, scale_a, scale_b, rows, block, col_scale, out_dtype)
    return overloads.matmul_rotated(a, b, scale_a, scale_b, rows, block, col_scale, out_dtype, fast_accum)


def takes_blocks(x: Tensor) -> bool:
    """Whether products of e4m3 on the device of x take a scale for each row and block of the contraction: on Hopper, with kernels that
    were built for it."""
    return x.is_cuda and x.dtype != torch.float64 and _is_built_for_hopper(x.device.index or 0)


_BUILT_FOR_HOPPER: dict[int, bool] = {}


def _is_built_for_hopper(device: int) -> bool:
    if device not in _BUILT_FOR_HOPPER:
        built = kernel_status()["build"].get("architectures", ())
        _BUILT_FOR_HOPPER[device] = "sm_90a" in built and torch.cuda.get_device_capability(device) == (9, 0)
    return _BUILT_FOR_HOPPER[device]


# What torch.compiler.assume_constant_result does, which imports the compiler.
_is_built_for_hopper._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _are_rounded_by_kernels(dtype: torch.dtype, out_dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    wide = torch.float64
    return dtype in reference.QMAX and out_dtype != wide and x.dtype != wide and weight.dtype != wide


def _has_kernel(a: Tensor, out_dtype: torch.dtype) -> bool:
    return a.dtype in reference.QMAX and out_dtype != torch.float64
