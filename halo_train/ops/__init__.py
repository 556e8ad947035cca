"""The library's torch operators as functions that check their arguments.

Each op has a reference in :mod:`halo_train.ops.reference` or a file beside it, which is its CPU implementation. On CUDA an op
in :data:`KERNEL_OPS` runs its kernel in ``csrc/`` and raises when the kernels are not built; one in ``schemas.TRITON_OPS`` runs a
Triton kernel. Quantising float64 values, or without rounding, is for checks: it is the reference on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused_reference, reference
from .block_scales import gated_grad_blocks as gated_grad_blocks
from .block_scales import quantize_grad_blocks as quantize_grad_blocks
from .block_scales import quantize_tiles as quantize_tiles
from .checks import MAX_BLOCK as MAX_BLOCK
from .checks import MIN_ROUNDS_BLOCK as MIN_ROUNDS_BLOCK
from .checks import (
    check_block,
    check_gated,
    check_gated_grad,
    check_hadamard,
    check_matrix,
    check_norm,
    check_norm_backward,
    check_rounding,
    check_rounds,
    check_vector,
)
from .checks import check_input as check_input
from .norm_backward import MAX_GRADIENTS as MAX_GRADIENTS
from .products import matmul_gradients as matmul_gradients
from .products import matmul_rotated as matmul_rotated
from .products import matmul_rounded as matmul_rounded
from .products import matmul_rows as matmul_rows
from .products import matmul_weight_columns as matmul_weight_columns
from .products import matmul_weight_rows as matmul_weight_rows
from .products import scaled_matmul as scaled_matmul
from .products import takes_blocks as takes_blocks
from .reference import SCALE_BLOCK as SCALE_BLOCK
from .registry import kernel_status as kernel_status
from .registry import library, overloads
from .schemas import KERNEL_OPS as KERNEL_OPS

MAX_ORDER = 64
"""Largest order of a matrix that the CUDA kernel takes beside the power of two: four tiles of the tensor cores."""

MATRIX_POWERS = (64, 128, 256, 512, 1024)
"""Powers of two beside a matrix in the CUDA kernel, the last for orders from 20 to 32: a block of float32 has to fit shared
memory."""


def hadamard(
    x: Tensor,
    block: int,
    scale: float,
    signs: Tensor | None = None,
    out_scale: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Tensor:
    """scale * (x diag(signs)) (I kron H) diag(out_scale) over the last axis; see :func:`reference.hadamard`.

    Differentiable in x, not in signs and out_scale. A matrix on a GPU: 16-bit x, an order up to :data:`MAX_ORDER`, and a
    power of two in :data:`MATRIX_POWERS`.

    Raises:
        ValueError: x is not real floating point, block is no power of two up to 32768 (times the order of the matrix) or
            does not divide the axis, signs or out_scale has the wrong shape or device or requires grad.
        RuntimeError: x is on a GPU and the kernels are not built for it, or not for this matrix.
    """
    check_hadamard("hadamard", x, block, signs, out_scale, matrix)
    return overloads.hadamard(x, block, scale, signs, out_scale, matrix)


def hadamard_(
    x: Tensor,
    block: int,
    scale: float,
    signs: Tensor | None = None,
    out_scale: Tensor | None = None,
    matrix: Tensor | None = None,
) -> None:
    """:func:`hadamard` in place, without a second tensor of x's size where x is contiguous. Not differentiable.

    Raises:
        ValueError: as hadamard; also if autograd would record the operation.
        RuntimeError: as hadamard.
    """
    check_hadamard("hadamard_", x, block, signs, out_scale, matrix)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("hadamard_: x must not require grad, or be under torch.no_grad(); use hadamard()")
    overloads.hadamard_(x, block, scale, signs, out_scale, matrix)


def hadamard_rounds(
    x: Tensor, block: int, scale: float, first: Tensor | None, middle: Tensor, last: Tensor | None = None
) -> Tensor:
    """scale * x diag(first) (I kron H) diag(middle) (I kron H) diag(last) over the last axis, in one pass with one rounding;
    see :func:`reference.hadamard_rounds` for the signs, which are bits. Differentiable in x.

    Raises:
        ValueError: x on a GPU is not of 16 or 32 bits, block is no power of two from 64 to 32768 or does not divide the axis,
            signs of the wrong shape, dtype or device.
        RuntimeError: x is on a GPU and the kernels are not built for it.
    """
    check_rounds("hadamard_rounds", x, block, first, middle, last)
    return overloads.hadamard_rounds(x, block, scale, first, middle, last)


def hadamard_rounds_(
    x: Tensor, block: int, scale: float, first: Tensor | None, middle: Tensor, last: Tensor | None = None
) -> None:
    """:func:`hadamard_rounds` in place, without a second tensor of x's size where x is contiguous. Not differentiable.

    Raises:
        ValueError: as hadamard_rounds; also if autograd would record the operation.
        RuntimeError: as hadamard_rounds.
    """
    check_rounds("hadamard_rounds_", x, block, first, middle, last)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "hadamard_rounds_: x must not require grad, or be under torch.no_grad(); use hadamard_rounds()"
        )
    overloads.hadamard_rounds_(x, block, scale, first, middle, last)


def hadamard_axis(x: Tensor, block: int, scale: float, signs: Tensor | None = None) -> Tensor:
    """:func:`hadamard` along the middle axis of x [outer, n, inner], without a transpose on a GPU.

    A GPU takes contiguous x of 16 or 32 bits with an even ``inner`` and blocks from 2; those above 1024 are two passes.
    """
    check_input("hadamard_axis", x)
    check_block("hadamard_axis", block, x.shape[1])
    if signs is not None:
        check_vector("hadamard_axis", "signs", signs, x.shape[1], x)
    return overloads.hadamard_axis(x, block, scale, signs)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit rows of (x diag(col_scale)) H_block, one scale a row; see :func:`reference.quantize_rows`."""
    check_matrix("quantize_rows", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows(x, dtype, block, col_scale)
    return overloads.quantize_rows(x, dtype, block, col_scale)


def quantize_rows_transposed(
    x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit rows of (diag(row_scale) x)^T, one scale a row; see :func:`reference.quantize_rows_transposed`."""
    check_matrix("quantize_rows_transposed", x, 1, None)
    if row_scale is not None:
        check_vector("quantize_rows_transposed", "row_scale", row_scale, x.shape[0], x)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows_transposed(x, dtype, row_scale)
    return overloads.quantize_rows_transposed(x, dtype, row_scale)


def quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both 8-bit forms of a gradient and its column sums in two reads; see :func:`reference.quantize_grad`."""
    check_matrix("quantize_grad", e, 1, col_scale)
    check_vector("quantize_grad", "row_scale", row_scale, e.shape[0], e)
    if not _has_kernel_types(e, dtype):
        return reference.quantize_grad(e, dtype, col_scale, row_scale, column_sums)
    return overloads.quantize_grad(e, dtype, col_scale, row_scale, column_sums)


def transpose_bytes(x: Tensor) -> Tensor:
    """A matrix of one-byte elements, transposed and contiguous.

    Raises:
        ValueError: x is no matrix or its elements are wider.
    """
    if x.dim() != 2 or x.element_size() != 1:
        raise ValueError(
            f"transpose_bytes: x must be a matrix of one-byte elements; got shape {tuple(x.shape)}, {x.dtype}"
        )
    return overloads.transpose_bytes(x)


def equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent and 2^-exponent of an int8 vector, float32."""
    return overloads.equalizer_factors(exponent)


def quantize_tensor(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit (x diag(col_scale)) H_block, one scale for the tensor; see :func:`reference.quantize_tensor`."""
    check_matrix("quantize_tensor", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_tensor(x, dtype, block, col_scale)
    return overloads.quantize_tensor(x, dtype, block, col_scale)


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dtype: torch.dtype,
    block: int = 1,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A norm of the rows of x, rotated and rounded in one pass; see :func:`fused_reference.norm_quantize`. Not differentiable.

    Raises:
        ValueError: x is no matrix, a vector or the block does not fit, eps is negative, bias without ``center``.
    """
    check_norm("norm_quantize", x, weight, bias, eps, center, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return fused_reference.norm_quantize(x, weight, bias, eps, center, dtype, block, col_scale)
    return overloads.norm_quantize(x, weight, bias, eps, center, dtype, block, col_scale)


def rms_norm_backward(
    dys: list[Tensor], x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and dweight of an RMSNorm from the sum of several dy; see :func:`fused_reference.rms_norm_backward`.

    Raises:
        ValueError: x is no matrix, no dy, or one of another shape, rstd or weight that do not fit.
    """
    check_norm_backward("rms_norm_backward", dys, x, weight, rstd)
    return overloads.rms_norm_backward(dys, x, weight, rstd)


def gated_quantize(
    gate: Tensor,
    up: Tensor,
    activation: str,
    dtype: torch.dtype,
    block: int = 1,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """act(gate) * up, rotated and rounded in one pass; see :func:`fused_reference.gated_quantize`. Not differentiable.

    Raises:
        ValueError: gate is no matrix, up is none of its kind, unknown activation, the block or col_scale does not fit.
    """
    check_matrix("gated_quantize", gate, block, col_scale)
    check_gated("gated_quantize", gate, activation, up=up)
    if not _has_kernel_types(gate, dtype):
        return fused_reference.gated_quantize(gate, up, activation, dtype, block, col_scale)
    return overloads.gated_quantize(gate, up, activation, dtype, block, col_scale)


def gated_grad_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dtype: torch.dtype,
    row_scale: Tensor,
    gate_col_scale: Tensor | None = None,
    up_col_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of gate and up in both 8-bit forms, in two reads; see :func:`fused_reference.gated_grad_quantize`.

    Raises:
        ValueError: as gated_quantize.
    """
    op = "gated_grad_quantize"
    check_gated_grad(op, dh, gate, up, activation, row_scale, gate_col_scale, up_col_scale)
    arguments = (dh, gate, up, activation, dtype, row_scale, gate_col_scale, up_col_scale)
    if not _has_kernel_types(dh, dtype):
        return fused_reference.gated_grad_quantize(*arguments)
    return overloads.gated_grad_quantize(*arguments)


def copy_after(x: Tensor, e: Tensor) -> Tensor:
    """A copy of x that a compiler cannot make before there is an e."""
    return overloads.copy_after(x, e)


def random_signs(like: Tensor, n: int, seed: int, stream: int) -> Tensor:
    """:func:`halo_train.hadamard.random_signs` on the device of ``like``, for compiled graphs."""
    return overloads.random_signs(like, n, seed, stream)


def random_bits(like: Tensor, n: int, seed: int, stream: int) -> Tensor:
    """The same as bits, uint8 [ceil(n / 8)]."""
    return overloads.random_bits(like, n, seed, stream)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes, sums and sums of squares along both axes of a matrix; see :func:`reference.moments`."""
    check_matrix("moments", x, 1, None)
    return reference.moments(x) if x.dtype == torch.float64 else overloads.moments(x)


def rounding_moments(
    x: Tensor, data: Tensor, scale: Tensor, largest: float, counted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of stacked matrices and of what rounding left of them, in one pass; see :func:`reference.rounding_moments`."""
    check_rounding("rounding_moments", x, data, scale, counted)
    if not _has_kernel_types(x, data.dtype):
        return reference.rounding_moments(x, data, scale, largest, counted)
    return overloads.rounding_moments(x, data, scale, largest, counted)


def _has_kernel_types(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype != torch.float64 and dtype in reference.QMAX


def _setup_hadamard(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.scale, signs, out_scale, matrix = inputs
    ctx.save_for_backward(signs, out_scale, matrix)


def _backward_hadamard(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # y = scale x diag(signs) H diag(out_scale), so dx = scale ((dy diag(out_scale)) H^T) diag(signs): the signs are factors
    # of the result here.
    signs, out_scale, matrix = ctx.saved_tensors
    transposed = None if matrix is None else matrix.t().contiguous()
    dtype = grad.dtype
    if out_scale is not None:
        # In the wider type, so that the gradient too is rounded once.
        wide = torch.promote_types(dtype, torch.float32)
        grad = grad.to(wide) * out_scale.to(wide)
    dx = hadamard(grad, ctx.block, ctx.scale, signs=None, out_scale=signs, matrix=transposed).to(dtype)
    return dx, None, None, None, None, None


def _setup_hadamard_rounds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.scale, *signs = inputs
    ctx.save_for_backward(*signs)


def _backward_hadamard_rounds(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    first, middle, last = ctx.saved_tensors
    dx = hadamard_rounds(grad, ctx.block, ctx.scale, last, middle, first)
    return dx, None, None, None, None, None


def _setup_hadamard_axis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.scale, signs = inputs
    ctx.save_for_backward(signs)


def _backward_hadamard_axis(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors
    dx = hadamard_axis(grad.contiguous(), ctx.block, ctx.scale)
    return (dx if signs is None else dx * signs.to(dx.dtype)[:, None]), None, None, None


torch.library.register_autograd(
    "halo_train::hadamard", _backward_hadamard, setup_context=_setup_hadamard, lib=library
)
torch.library.register_autograd(
    "halo_train::hadamard_rounds",
    _backward_hadamard_rounds,
    setup_context=_setup_hadamard_rounds,
    lib=library,
)
torch.library.register_autograd(
    "halo_train::hadamard_axis", _backward_hadamard_axis, setup_context=_setup_hadamard_axis, lib=library
)
