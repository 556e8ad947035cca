"""The library's torch operators: schemas, shape checks, fake kernels, and which implementation serves which device.

The only file that names ``torch.ops``. Each op has a reference in :mod:`halo_train.ops.reference` or
:mod:`halo_train.ops.fused_reference`, which is its CPU implementation. On CUDA an op in :data:`KERNEL_OPS` runs its kernel in ``csrc/`` and raises when the kernels are not
built; one in :data:`TRITON_OPS` runs a Triton kernel. Quantising float64 values, or without rounding, is for checks: it is the
reference on every device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import fused_reference, reference
from .checks import MAX_BLOCK as MAX_BLOCK
from .checks import MIN_ROUNDS_BLOCK as MIN_ROUNDS_BLOCK
from .checks import (
    check_block,
    check_gated,
    check_hadamard,
    check_matrix,
    check_norm,
    check_norm_backward,
    check_rounds,
    check_vector,
)
from .checks import check_input as check_input
from .fakes import FAKES
from .norm_backward import MAX_GRADIENTS as MAX_GRADIENTS
from .schemas import KERNEL_OPS as KERNEL_OPS
from .schemas import SCHEMAS, TRITON_OPS

MAX_ORDER = 64
"""Largest order of a matrix that the CUDA kernel takes beside the power of two: four tiles of the tensor cores."""

MATRIX_POWERS = (64, 128, 256, 512, 1024)
"""Powers of two beside a matrix in the CUDA kernel, the last for orders from 20 to 32: a block of float32 has to fit shared
memory."""


_LIBRARY_FILE = Path(__file__).parent.with_name("_kernels.so")
_BUILD_FILE = Path(__file__).parent.with_name("_kernels.json")
_library = torch.library.Library("halo_train", "DEF")
_overloads = SimpleNamespace()
"""The operators: looking an overload up costs the host as much as calling it."""


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
    return _overloads.hadamard(x, block, scale, signs, out_scale, matrix)


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
    _overloads.hadamard_(x, block, scale, signs, out_scale, matrix)


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
    return torch.ops.halo_train.hadamard_rounds(x, block, scale, first, middle, last)


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
    torch.ops.halo_train.hadamard_rounds_(x, block, scale, first, middle, last)


def hadamard_axis(x: Tensor, block: int, scale: float, signs: Tensor | None = None) -> Tensor:
    """:func:`hadamard` along the middle axis of x [outer, n, inner], without a transpose on a GPU.

    A GPU takes contiguous x of 16 or 32 bits with an even ``inner`` and blocks from 2; those above 1024 are two passes.
    """
    check_input("hadamard_axis", x)
    check_block("hadamard_axis", block, x.shape[1])
    if signs is not None:
        check_vector("hadamard_axis", "signs", signs, x.shape[1], x)
    return _overloads.hadamard_axis(x, block, scale, signs)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit rows of (x diag(col_scale)) H_block, one scale a row; see :func:`reference.quantize_rows`."""
    check_matrix("quantize_rows", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows(x, dtype, block, col_scale)
    return _overloads.quantize_rows(x, dtype, block, col_scale)


def quantize_rows_transposed(
    x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit rows of (diag(row_scale) x)^T, one scale a row; see :func:`reference.quantize_rows_transposed`."""
    check_matrix("quantize_rows_transposed", x, 1, None)
    if row_scale is not None:
        check_vector("quantize_rows_transposed", "row_scale", row_scale, x.shape[0], x)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows_transposed(x, dtype, row_scale)
    return _overloads.quantize_rows_transposed(x, dtype, row_scale)


def quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both 8-bit forms of a gradient and its column sums in two reads; see :func:`reference.quantize_grad`."""
    check_matrix("quantize_grad", e, 1, col_scale)
    check_vector("quantize_grad", "row_scale", row_scale, e.shape[0], e)
    if not _has_kernel_types(e, dtype):
        return reference.quantize_grad(e, dtype, col_scale, row_scale, column_sums)
    return _overloads.quantize_grad(e, dtype, col_scale, row_scale, column_sums)


def transpose_bytes(x: Tensor) -> Tensor:
    """A matrix of one-byte elements, transposed and contiguous.

    Raises:
        ValueError: x is no matrix or its elements are wider.
    """
    if x.dim() != 2 or x.element_size() != 1:
        raise ValueError(
            f"transpose_bytes: x must be a matrix of one-byte elements; got shape {tuple(x.shape)}, {x.dtype}"
        )
    return _overloads.transpose_bytes(x)


def equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent and 2^-exponent of an int8 vector, float32."""
    return _overloads.equalizer_factors(exponent)


def quantize_tensor(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit (x diag(col_scale)) H_block, one scale for the tensor; see :func:`reference.quantize_tensor`."""
    check_matrix("quantize_tensor", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_tensor(x, dtype, block, col_scale)
    return _overloads.quantize_tensor(x, dtype, block, col_scale)


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
    return _overloads.norm_quantize(x, weight, bias, eps, center, dtype, block, col_scale)


def rms_norm_backward(
    dys: list[Tensor], x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and dweight of an RMSNorm from the sum of several dy; see :func:`fused_reference.rms_norm_backward`.

    Raises:
        ValueError: x is no matrix, no dy, or one of another shape, rstd or weight that do not fit.
    """
    check_norm_backward("rms_norm_backward", dys, x, weight, rstd)
    return _overloads.rms_norm_backward(dys, x, weight, rstd)


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
    return _overloads.gated_quantize(gate, up, activation, dtype, block, col_scale)


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
    check_matrix(op, dh, 1, gate_col_scale)
    check_gated(op, dh, activation, gate=gate, up=up)
    check_vector(op, "row_scale", row_scale, dh.shape[0], dh)
    if up_col_scale is not None:
        check_vector(op, "up_col_scale", up_col_scale, dh.shape[1], dh)
    arguments = (dh, gate, up, activation, dtype, row_scale, gate_col_scale, up_col_scale)
    if not _has_kernel_types(dh, dtype):
        return fused_reference.gated_grad_quantize(*arguments)
    return _overloads.gated_grad_quantize(*arguments)


def int8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """diag(scale_a) (a b^T) diag(scale_b) of int8 matrices; see :func:`reference.int8_matmul`."""
    return _overloads.int8_matmul(a, b, scale_a, scale_b, out_dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes, sums and sums of squares along both axes of a matrix; see :func:`reference.moments`."""
    check_matrix("moments", x, 1, None)
    return reference.moments(x) if x.dtype == torch.float64 else _overloads.moments(x)


def kernel_status() -> dict[str, Any]:
    """What the build left behind: ``{"loaded": bool, "reason": str, "build": dict, "ops": {op: implementation}}``."""
    ops = {name: "Triton kernel" if name in TRITON_OPS else "CUDA kernel" for name in SCHEMAS}
    ops["int8_matmul"] = "Triton kernel on Hopper, torch._int_mm elsewhere"
    return {"loaded": not _why_not_loaded, "reason": _why_not_loaded, "build": _build_info(), "ops": ops}


def _has_kernel_types(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype != torch.float64 and dtype in reference.QMAX


def _build_info() -> dict[str, Any]:
    return json.loads(_BUILD_FILE.read_text()) if _BUILD_FILE.exists() else {}


def _load() -> str:
    """Loads the kernels; returns why that was not possible, or an empty string."""
    if not _LIBRARY_FILE.exists():
        return _build_info().get("reason", "the package was installed without building them")
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA"
    try:
        torch.ops.load_library(_LIBRARY_FILE)
    except OSError as error:
        return f"{_LIBRARY_FILE.name} could not be loaded: {error}"
    return ""


def _refuse(op: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"halo_train: '{op}' was called on a CUDA tensor, but its kernel is not available: {_why_not_loaded}. Install "
            "the CUDA toolkit (nvcc) and run `pip install --force-reinstall --no-deps halo_train`, or move the tensor to "
            "the CPU; `halo-train doctor` shows the state"
        )

    return refuse


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


for _name, (_schema, _reference) in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _reference, "CPU")
    torch.library.register_fake(f"halo_train::{_name}", FAKES[_name], lib=_library)
    setattr(_overloads, _name, getattr(torch.ops.halo_train, _name).default)
torch.library.register_autograd(
    "halo_train::hadamard", _backward_hadamard, setup_context=_setup_hadamard, lib=_library
)
torch.library.register_autograd(
    "halo_train::hadamard_rounds",
    _backward_hadamard_rounds,
    setup_context=_setup_hadamard_rounds,
    lib=_library,
)
torch.library.register_autograd(
    "halo_train::hadamard_axis", _backward_hadamard_axis, setup_context=_setup_hadamard_axis, lib=_library
)
_why_not_loaded = _load()
for _name in SCHEMAS:
    if _name in TRITON_OPS:
        _library.impl(_name, TRITON_OPS[_name], "CUDA")
    elif _why_not_loaded:
        _library.impl(_name, _refuse(_name), "CUDA")
