"""hadamard_transform(): the differentiable Hadamard rotation of one axis of a tensor."""

from __future__ import annotations

import math

from torch import Tensor

from . import ops


def largest_block(n: int) -> int:
    """Largest power of two, at most 32768, that divides ``n``: the block that a rotation of an axis of ``n`` uses."""
    return min(n & -n, ops.MAX_BLOCK) if n else 1


def hadamard_transform(
    x: Tensor,
    *,
    axis: int = -1,
    block: int | None = None,
    signs: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Rotates one axis: y = scale * (x diag(signs)) (I kron H), blocks of ``block`` neighbouring elements at a time.

    H is the +-1 Sylvester matrix in natural order, as ``scipy.linalg.hadamard(block)``. With the default scale the
    rotation is orthonormal: applied twice (``signs=None``) it returns x, and with signs the inverse is
    ``hadamard_transform(y) * signs``. Sums are in float32 (float64 for float64), rounded once. Differentiable in x.

    Args:
        x: any shape, any real floating-point dtype, any strides.
        axis: the axis to rotate.
        block: a power of two, at most 32768, that divides the axis; None takes the largest.
        signs: one value per index of the axis, shape [x.shape[axis]], each +1 or -1 (not checked: reading them would
            synchronise with the GPU), any real dtype.
        scale: None is 1/sqrt(block).

    Returns:
        Same shape, dtype and device as x.

    Raises:
        ValueError: integer or complex x, a block that does not fit the axis, signs of another shape or device.
        IndexError: axis out of range.
        RuntimeError: x is on a GPU and the kernels are not built.
    """
    ops.check_input("hadamard_transform", x)
    if not -x.dim() <= axis < x.dim():
        raise IndexError(
            f"hadamard_transform: axis must be in [{-x.dim()}, {x.dim() - 1}] for {x.dim()} dimensions; got {axis}"
        )
    if block is None:
        block = largest_block(x.shape[axis])
    if scale is None:
        scale = 1.0 / math.sqrt(block) if block > 0 else 1.0
    return ops.hadamard(x.movedim(axis, -1), block, scale, signs).movedim(-1, axis)
