"""Gradients and weights in e4m3 with scales for blocks, as functions that check their arguments; float64 goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import block_reference
from .checks import check_block_dtype, check_gated_grad, check_matrix, check_vector
from .registry import overloads


def quantize_grad_blocks(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both 8-bit forms of a gradient with scales for blocks, and its column sums, in one read; see
    :func:`block_reference.quantize_grad_blocks`.

    Raises:
        ValueError: e is no matrix, a vector does not fit, dtype is not float8_e4m3fn.
        RuntimeError: e is on a GPU before Hopper.
    """
    op = "quantize_grad_blocks"
    check_matrix(op, e, 1, col_scale)
    check_vector(op, "row_scale", row_scale, e.shape[0], e)
    check_block_dtype(op, dtype)
    if e.dtype == torch.float64:
        return block_reference.quantize_grad_blocks(e, dtype, col_scale, row_scale, column_sums)
    return overloads.quantize_grad_blocks(e, dtype, col_scale, row_scale, column_sums)


def quantize_tiles(
    x: Tensor,
    dtype: torch.dtype,
    divisor: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns of a weight or an input with a scale for each tile, in one read; see :func:`block_reference.quantize_tiles`.

    Raises:
        ValueError: x is no matrix, a vector does not fit, dtype is not float8_e4m3fn.
        RuntimeError: x is on a GPU before Hopper.
    """
    op = "quantize_tiles"
    check_matrix(op, x, 1, col_scale)
    for name, factors in (("divisor", divisor), ("row_scale", row_scale)):
        if factors is not None:
            check_vector(op, name, factors, x.shape[0], x)
    check_block_dtype(op, dtype)
    if x.dtype == torch.float64:
        return block_reference.quantize_tiles(x, dtype, divisor, row_scale, col_scale)
    return overloads.quantize_tiles(x, dtype, divisor, row_scale, col_scale)


def gated_grad_blocks(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dtype: torch.dtype,
    row_scale: Tensor,
    gate_col_scale: Tensor | None = None,
    up_col_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of gate and up in both 8-bit forms with scales for blocks, in one read; see
    :func:`block_reference.gated_grad_blocks`.

    Raises:
        ValueError: as gated_quantize; dtype is not float8_e4m3fn.
        RuntimeError: dh is on a GPU before Hopper.
    """
    op = "gated_grad_blocks"
    check_gated_grad(op, dh, gate, up, activation, row_scale, gate_col_scale, up_col_scale)
    check_block_dtype(op, dtype)
    arguments = (dh, gate, up, activation, dtype, row_scale, gate_col_scale, up_col_scale)
    if dh.dtype == torch.float64:
        return block_reference.gated_grad_blocks(*arguments)
    return overloads.gated_grad_blocks(*arguments)
