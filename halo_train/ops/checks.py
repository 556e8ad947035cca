"""What the operators require of their arguments; errors name argument, requirement, value and remedy.

They are asked in every call, so what is asked costs the host as little as Python can: a layer's operators spent a tenth of its time here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_reference import ACTIVATIONS
from .reference import SCALE_BLOCK

MAX_BLOCK = 32768
"""Largest Hadamard block of the CUDA kernel: one row of float32 has to fit the registers of one thread block."""


MIN_ROUNDS_BLOCK = 64
"""Smallest block of the kernel for two rounds, which reads signs as words of 64 bits."""


_REAL = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


def check_input(op: str, x: Tensor) -> int:
    """Length of the last axis of x; a ValueError that names ``op`` when x is not real floating point of 16 bits or more, or
    is a scalar."""
    if x.dtype not in _REAL:
        raise ValueError(
            f"{op}: x must have a real floating-point dtype of at least 16 bits; got {x.dtype}; convert it first, e.g. "
            "x.float()"
        )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension; got a scalar; use x.reshape(1)")
    return x.shape[-1]


def check_matrix(op: str, x: Tensor, block: int, col_scale: Tensor | None) -> None:
    shape = x.shape
    if x.dtype not in _REAL or len(shape) != 2:
        check_input(op, x)
        raise ValueError(
            f"{op}: x must be a matrix [rows, columns]; got shape {tuple(shape)}; flatten it first"
        )
    if block != 1:
        check_block(op, block, shape[1])
    if col_scale is not None:
        check_vector(op, "col_scale", col_scale, shape[1], x)


def check_gated_grad(
    op: str,
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    row_scale: Tensor,
    gate_col_scale: Tensor | None,
    up_col_scale: Tensor | None,
) -> None:
    check_matrix(op, dh, 1, gate_col_scale)
    check_gated(op, dh, activation, gate=gate, up=up)
    check_vector(op, "row_scale", row_scale, dh.shape[0], dh)
    if up_col_scale is not None:
        check_vector(op, "up_col_scale", up_col_scale, dh.shape[1], dh)


def check_block_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{op}: dtype must be float8_e4m3fn, whose products take scales for blocks; got {dtype}; use one scale a row"
        )


def check_rounding(op: str, x: Tensor, data: Tensor, scale: Tensor, counted: int) -> None:
    check_input(op, x)
    if counted < 1:
        raise ValueError(f"{op}: counted must be at least 1, every row; got {counted}")
    if x.dim() != 3 or data.shape != x.shape or scale.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: x must be [B, R, Q], data [B, R, Q] and scale [B, R]; got {tuple(x.shape)}, {tuple(data.shape)} and "
            f"{tuple(scale.shape)}; pass what quantize() returned for x"
        )
    if not x.device == data.device == scale.device:
        raise ValueError(
            f"{op}: x, data and scale must be on one device; got {x.device}, {data.device} and {scale.device}"
        )


def check_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    block: int,
    col_scale: Tensor | None,
) -> None:
    check_matrix(op, x, block, col_scale)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector(op, name, vector, x.shape[1], x)
    if bias is not None and not center:
        raise ValueError(f"{op}: bias must be None for an RMSNorm; got one; use center=True for a LayerNorm")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0; got {eps}")


def check_norm_backward(op: str, dys: list[Tensor], x: Tensor, weight: Tensor | None, rstd: Tensor) -> None:
    check_matrix(op, x, 1, None)
    shapes = [tuple(dy.shape) for dy in dys]
    if not dys or any(shape != tuple(x.shape) for shape in shapes):
        raise ValueError(f"{op}: dys must be one or more matrices of shape {tuple(x.shape)}; got {shapes}")
    if weight is not None:
        check_vector(op, "weight", weight, x.shape[1], x)
    if rstd.shape != (x.shape[0], 1):
        raise ValueError(f"{op}: rstd must have shape {(x.shape[0], 1)}; got {tuple(rstd.shape)}")


def check_gated(op: str, first: Tensor, activation: str, **others: Tensor) -> None:
    """The named tensors are like ``first``, and the activation is known."""
    for name, other in others.items():
        if other.shape != first.shape or other.dtype != first.dtype or other.device != first.device:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(first.shape)}, {first.dtype} on {first.device}; got {tuple(other.shape)}, "
                f"{other.dtype} on {other.device}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def check_hadamard(
    op: str, x: Tensor, block: int, signs: Tensor | None, out_scale: Tensor | None, matrix: Tensor | None
) -> None:
    n = check_input(op, x)
    if matrix is None:
        check_block(op, block, n)
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
        check_vector(op, name, vector, n, x)
        # torch.compile does not know requires_grad of the constant signs of a random rotation.
        if not torch.compiler.is_compiling() and vector.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad: its gradient is not computed; use {name}.detach()"
            )


def check_rounds(
    op: str, x: Tensor, block: int, first: Tensor | None, middle: Tensor, last: Tensor | None
) -> None:
    n = check_input(op, x)
    check_block(op, block, n)
    if block < MIN_ROUNDS_BLOCK or (x.is_cuda and x.element_size() > 4):
        raise ValueError(
            f"{op}: block must be at least {MIN_ROUNDS_BLOCK}, and x on a GPU have 16 or 32 bits; got {block} and {x.dtype}; "
            "call hadamard() for each round"
        )
    for name, bits in (("first", first), ("middle", middle), ("last", last)):
        if bits is None:
            continue
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (n // 8,) or bits.device != x.device:
            raise ValueError(
                f"{op}: {name} must be uint8 of shape ({n // 8},) on {x.device}, a bit for each index of the axis; got "
                f"shape {tuple(bits.shape)}, {bits.dtype} on {bits.device}"
            )


def check_block(op: str, block: int, n: int) -> None:
    if block < 1 or block & (block - 1) or block > MAX_BLOCK or n % block:
        largest = min(n & -n, MAX_BLOCK) if n else MAX_BLOCK
        raise ValueError(
            f"{op}: block must be a power of two, at most {MAX_BLOCK}, that divides the axis of length {n}; got {block}; "
            f"the largest for this axis is {largest}"
        )


def check_vector(op: str, name: str, v: Tensor, n: int, x: Tensor) -> None:
    if v.shape != (n,) or v.device != x.device or v.is_complex():
        raise ValueError(
            f"{op}: {name} must be a real vector of shape ({n},) on {x.device}; got shape {tuple(v.shape)}, {v.dtype} on "
            f"{v.device}"
        )


def check_product(
    op: str, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor | None, rows: bool = False
) -> None:
    """a [M, K] and b [N, K], or [K, N] with ``rows``, can be multiplied, and have scales of the rows and columns of the result, or one
    scale; a may have one for each row and block of K, and b then one for each tile."""
    check_contracted(op, a, b, rows)
    if scale_a.dim() == 2:
        _check_block_scales(op, a, b, scale_a)
    else:
        _check_scale(op, "scale_a", scale_a, a.shape[0], "rows")
    if scale_b is not None and scale_b.dim() == 2:
        _check_tile_scales(op, a.shape[1], b.shape[1 if rows else 0], scale_a, scale_b)
    elif scale_b is not None:
        _check_scale(op, "scale_b", scale_b, b.shape[1 if rows else 0], "columns" if rows else "rows")


def check_contracted(op: str, a: Tensor, b: Tensor, rows: bool = False) -> None:
    shape_a, shape_b = a.shape, b.shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[1] != shape_b[0 if rows else 1]:
        raise ValueError(
            f"{op}: the operands must be matrices whose contracted dimensions are equal; got {tuple(shape_a)} and {tuple(shape_b)}"
        )


def _check_block_scales(op: str, a: Tensor, b: Tensor, scale: Tensor) -> None:
    for operand in (a, b):
        if operand.dtype in (torch.int8, torch.float8_e5m2):
            raise ValueError(
                f"{op}: operands must be float8_e4m3fn where scale_a has a value for each block of the contraction; got "
                f"{operand.dtype}; use one scale a row"
            )
    expected = (-(-a.shape[1] // SCALE_BLOCK), a.shape[0])
    if scale.shape != expected:
        raise ValueError(
            f"{op}: scale_a must have shape {expected}, a value for each {SCALE_BLOCK} elements of the contraction and each row; "
            f"got {tuple(scale.shape)}"
        )


def _check_tile_scales(op: str, contraction: int, count: int, scale_a: Tensor, scale_b: Tensor) -> None:
    expected = (-(-contraction // SCALE_BLOCK), -(-count // SCALE_BLOCK))
    if scale_b.shape != expected or scale_a.dim() != 2:
        raise ValueError(
            f"{op}: scale_b must have one value, one for each of {count}, or, where scale_a has a value for each block of the contraction, "
            f"shape {expected}, a value for each tile of {SCALE_BLOCK} x {SCALE_BLOCK}; got {tuple(scale_b.shape)} with scale_a of shape "
            f"{tuple(scale_a.shape)}"
        )


def _check_scale(op: str, name: str, scale: Tensor, count: int, of: str) -> None:
    if scale.dim() and scale.shape != (count,):
        raise ValueError(
            f"{op}: {name} must have one value or one for each of {count} {of}; got shape {tuple(scale.shape)}"
        )
