"""The library's torch operators: schemas, shape checks, fake kernels, and which implementation serves which device.

The only file that names ``torch.ops``. Each op has a reference in :mod:`halo_train.reference`, which is its CPU
implementation. On CUDA an op in :data:`KERNEL_OPS` runs its kernel in ``csrc/`` and raises when the kernels are not
built; ``int8_matmul`` runs a Triton kernel; the other ops run their reference until a kernel is written for them. Quantising float64 values, or
without rounding, is for checks: it is the reference on every device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import int8_gemm, reference

MAX_BLOCK = 32768
"""Largest Hadamard block of the CUDA kernel: one row of float32 has to fit the registers of one thread block."""

MAX_ORDER = 64
"""Largest order of a matrix that the CUDA kernel takes beside the power of two: its input has to fit the registers."""

MATRIX_POWERS = (64, 128, 256, 512)
"""Powers of two beside a matrix in the CUDA kernel: 64 columns for each warp, a row of float32 in shared memory."""

KERNEL_OPS = {
    "hadamard": "hadamard.cu",
    "hadamard_": "hadamard.cu",
    "quantize_rows": "quantize.cu",
    "quantize_rows_transposed": "transpose.cu",
    "quantize_grad": "quantize.cu",
    "transpose_bytes": "transpose.cu",
    "quantize_tensor": "quantize.cu",
    "equalizer_factors": "equalizer.cu",
    "moments": "moments.cu",
}
"""Ops that have a CUDA kernel, and the file in ``csrc/`` that holds it."""

_TRITON_OPS: dict[str, Callable[..., Any]] = {"int8_matmul": int8_gemm.int8_matmul}

_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "hadamard": (
        "(Tensor x, int block, float scale, Tensor? signs=None, Tensor? out_scale=None, Tensor? matrix=None) -> Tensor",
        reference.hadamard,
    ),
    "hadamard_": (
        "(Tensor(a!) x, int block, float scale, Tensor? signs=None, Tensor? out_scale=None, Tensor? matrix=None) -> ()",
        reference.hadamard_,
    ),
    "quantize_rows": (
        "(Tensor x, ScalarType dtype, int block, Tensor? col_scale) -> (Tensor, Tensor)",
        reference.quantize_rows,
    ),
    "quantize_rows_transposed": (
        "(Tensor x, ScalarType dtype, Tensor row_scale) -> (Tensor, Tensor)",
        reference.quantize_rows_transposed,
    ),
    "quantize_grad": (
        "(Tensor e, ScalarType dtype, Tensor col_scale, Tensor row_scale, bool column_sums) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference.quantize_grad,
    ),
    "transpose_bytes": ("(Tensor x) -> Tensor", reference.transpose_bytes),
    "equalizer_factors": ("(Tensor exponent) -> (Tensor, Tensor)", reference.equalizer_factors),
    "quantize_tensor": (
        "(Tensor x, ScalarType dtype, int block, Tensor? col_scale) -> (Tensor, Tensor)",
        reference.quantize_tensor,
    ),
    "moments": ("(Tensor x) -> (Tensor, Tensor)", reference.moments),
    "int8_matmul": (
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype) -> Tensor",
        reference.int8_matmul,
    ),
}

_LIBRARY_FILE = Path(__file__).with_name("_kernels.so")
_BUILD_FILE = Path(__file__).with_name("_kernels.json")
_library = torch.library.Library("halo_train", "DEF")


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
    _check_hadamard("hadamard", x, block, signs, out_scale, matrix)
    return torch.ops.halo_train.hadamard(x, block, scale, signs, out_scale, matrix)


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
    _check_hadamard("hadamard_", x, block, signs, out_scale, matrix)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("hadamard_: x must not require grad, or be under torch.no_grad(); use hadamard()")
    torch.ops.halo_train.hadamard_(x, block, scale, signs, out_scale, matrix)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit rows of (x diag(col_scale)) H_block, one scale a row; see :func:`reference.quantize_rows`."""
    _check_matrix("quantize_rows", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows(x, dtype, block, col_scale)
    return torch.ops.halo_train.quantize_rows(x, dtype, block, col_scale)


def quantize_rows_transposed(x: Tensor, dtype: torch.dtype, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows of (diag(row_scale) x)^T, one scale a row; see :func:`reference.quantize_rows_transposed`."""
    _check_matrix("quantize_rows_transposed", x, 1, None)
    _check_vector("quantize_rows_transposed", "row_scale", row_scale, x.shape[0], x)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_rows_transposed(x, dtype, row_scale)
    return torch.ops.halo_train.quantize_rows_transposed(x, dtype, row_scale)


def quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both 8-bit forms of a gradient and its column sums in two reads; see :func:`reference.quantize_grad`."""
    _check_matrix("quantize_grad", e, 1, col_scale)
    _check_vector("quantize_grad", "row_scale", row_scale, e.shape[0], e)
    if not _has_kernel_types(e, dtype):
        return reference.quantize_grad(e, dtype, col_scale, row_scale, column_sums)
    return torch.ops.halo_train.quantize_grad(e, dtype, col_scale, row_scale, column_sums)


def transpose_bytes(x: Tensor) -> Tensor:
    """A matrix of one-byte elements, transposed and contiguous.

    Raises:
        ValueError: x is no matrix or its elements are wider.
    """
    if x.dim() != 2 or x.element_size() != 1:
        raise ValueError(
            f"transpose_bytes: x must be a matrix of one-byte elements; got shape {tuple(x.shape)}, {x.dtype}"
        )
    return torch.ops.halo_train.transpose_bytes(x)


def equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent and 2^-exponent of an int8 vector, float32."""
    return torch.ops.halo_train.equalizer_factors(exponent)


def quantize_tensor(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit (x diag(col_scale)) H_block, one scale for the tensor; see :func:`reference.quantize_tensor`."""
    _check_matrix("quantize_tensor", x, block, col_scale)
    if not _has_kernel_types(x, dtype):
        return reference.quantize_tensor(x, dtype, block, col_scale)
    return torch.ops.halo_train.quantize_tensor(x, dtype, block, col_scale)


def int8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """diag(scale_a) (a b^T) diag(scale_b) of int8 matrices; see :func:`reference.int8_matmul`."""
    return torch.ops.halo_train.int8_matmul(a, b, scale_a, scale_b, out_dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes, sums and sums of squares along both axes of a matrix; see :func:`reference.moments`."""
    _check_matrix("moments", x, 1, None)
    return reference.moments(x) if x.dtype == torch.float64 else torch.ops.halo_train.moments(x)


def kernel_status() -> dict[str, Any]:
    """What the build left behind: ``{"loaded": bool, "reason": str, "build": dict, "ops": {op: implementation}}``."""
    ops = {name: _implementation(name) for name in _SCHEMAS}
    return {"loaded": not _why_not_loaded, "reason": _why_not_loaded, "build": _build_info(), "ops": ops}


def _implementation(op: str) -> str:
    if op in _TRITON_OPS:
        return "Triton kernel on Hopper, torch._int_mm elsewhere"
    return "CUDA kernel" if op in KERNEL_OPS else "PyTorch reference on the GPU"


def _has_kernel_types(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype != torch.float64 and dtype in reference.QMAX


def check_input(op: str, x: Tensor) -> int:
    """Length of the last axis of x; a ValueError that names ``op`` when x is not real floating point of 16 bits or more, or
    is a scalar."""
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(
            f"{op}: x must have a real floating-point dtype of at least 16 bits; got {x.dtype}; convert it first, e.g. "
            "x.float()"
        )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension; got a scalar; use x.reshape(1)")
    return x.shape[-1]


def _check_matrix(op: str, x: Tensor, block: int, col_scale: Tensor | None) -> None:
    check_input(op, x)
    if x.dim() != 2:
        raise ValueError(
            f"{op}: x must be a matrix [rows, columns]; got shape {tuple(x.shape)}; flatten it first"
        )
    _check_block(op, block, x.shape[1])
    if col_scale is not None:
        _check_vector(op, "col_scale", col_scale, x.shape[1], x)


def _check_hadamard(
    op: str, x: Tensor, block: int, signs: Tensor | None, out_scale: Tensor | None, matrix: Tensor | None
) -> None:
    n = check_input(op, x)
    if matrix is None:
        _check_block(op, block, n)
    else:
        m = matrix.shape[0]
        if matrix.dtype != x.dtype or matrix.shape != (m, m) or matrix.device != x.device:
            raise ValueError(
                f"{op}: matrix must be a square matrix of {x.dtype} on {x.device}; got shape {tuple(matrix.shape)}, {matrix.dtype} on "
                f"{matrix.device}"
            )
        if block % m or n % block or block // m & (block // m - 1) or not m <= block <= m * MAX_BLOCK:
            raise ValueError(
                f"{op}: block must be {m}, the order of the matrix, times a power of two up to {MAX_BLOCK} and divide the axis "
                f"of length {n}; got {block}"
            )
    for name, vector in (("signs", signs), ("out_scale", out_scale)):
        if vector is None:
            continue
        _check_vector(op, name, vector, n, x)
        if vector.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad: its gradient is not computed; use {name}.detach()"
            )


def _check_block(op: str, block: int, n: int) -> None:
    largest = min(n & -n, MAX_BLOCK) if n else MAX_BLOCK
    if block < 1 or block & (block - 1) or block > MAX_BLOCK or n % block:
        raise ValueError(
            f"{op}: block must be a power of two, at most {MAX_BLOCK}, that divides the axis of length {n}; got {block}; "
            f"the largest for this axis is {largest}"
        )


def _check_vector(op: str, name: str, v: Tensor, n: int, x: Tensor) -> None:
    if tuple(v.shape) != (n,) or v.device != x.device or v.is_complex():
        raise ValueError(
            f"{op}: {name} must be a real vector of shape ({n},) on {x.device}; got shape {tuple(v.shape)}, {v.dtype} on "
            f"{v.device}"
        )


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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_hadamard(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int, col_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=_wide(x))


def _fake_quantize_rows_transposed(x: Tensor, dtype: torch.dtype, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[1], x.shape[0]), dtype=dtype), x.new_empty(x.shape[1:], dtype=_wide(x))


def _fake_quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor, row_scale: Tensor, column_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, u = _fake_quantize_rows(e, dtype, 1, col_scale)
    b, v = _fake_quantize_rows_transposed(e, dtype, row_scale)
    return a, u, b, v, e.new_empty(e.shape[1] if column_sums else 0, dtype=v.dtype)


def _fake_equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(exponent.new_empty(exponent.shape, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


def _fake_quantize_tensor(
    x: Tensor, dtype: torch.dtype, block: int, col_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=_wide(x))


def _fake_int8_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "hadamard": _fake_hadamard,
    "hadamard_": lambda *_: None,
    "quantize_rows": _fake_quantize_rows,
    "quantize_rows_transposed": _fake_quantize_rows_transposed,
    "quantize_grad": _fake_quantize_grad,
    "transpose_bytes": lambda x: x.new_empty((x.shape[1], x.shape[0])),
    "equalizer_factors": _fake_equalizer_factors,
    "quantize_tensor": _fake_quantize_tensor,
    "moments": lambda x: (
        x.new_empty((3, x.shape[0]), dtype=torch.float64),
        x.new_empty((2, x.shape[1]), dtype=torch.float64),
    ),
    "int8_matmul": _fake_int8_matmul,
}


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


for _name, (_schema, _reference) in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _reference, "CPU")
    torch.library.register_fake(f"halo_train::{_name}", _FAKES[_name], lib=_library)
torch.library.register_autograd(
    "halo_train::hadamard", _backward_hadamard, setup_context=_setup_hadamard, lib=_library
)
_why_not_loaded = _load()
for _name, (_, _reference) in _SCHEMAS.items():
    if _name not in KERNEL_OPS:
        _library.impl(_name, _TRITON_OPS.get(_name, _reference), "CUDA")
    elif _why_not_loaded:
        _library.impl(_name, _refuse(_name), "CUDA")
