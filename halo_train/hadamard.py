"""hadamard_transform() and random_rotation(): differentiable Hadamard rotations of one axis of a tensor."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import ops
from .hadamard_matrices import ORDERS, hadamard_matrix
from .ops.signs import kept_bits, kept_signs, signs_of_seed


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
    transpose: bool = False,
) -> Tensor:
    """Rotates one axis: y = scale * (x diag(signs)) (I kron H), blocks of ``block`` neighbouring elements at a time.

    For a power of two H is the +-1 Sylvester matrix in natural order, as ``scipy.linalg.hadamard(block)``, which is
    symmetric. For block = m 2^k, with m one of ``halo_train.hadamard_matrices.ORDERS``, H = H_m kron Sylvester(2^k), which
    in general is not. With the default scale the rotation is orthonormal; its inverse is
    ``hadamard_transform(y, block=block, transpose=True) * signs``. Sums are in float32 (float64 for float64), rounded once.
    Differentiable in x.

    A power of two is one pass over memory on a GPU, and so is m 2^k of 16-bit x with m up to 60, from 64 m to 512 m (12: to
    2048 m; 20 and 28: to 1024 m) where a thread block can have the shared memory for it (227 KB for 28672). Other m 2^k take
    a float32 pass and a matrix product with H_m, for which torch.backends.cuda.matmul.allow_tf32 must be off.
    Along another axis than the last, a power of two of dense x with an even last dimension is transformed where it lies, in
    one pass up to 1024 and in two with float32 between them above; everything else goes by way of a transpose.

    Args:
        x: any shape, any real floating-point dtype, any strides.
        axis: the axis to rotate.
        block: divides the axis; None takes the largest power of two, at most 32768, that does.
        signs: one value per index of the axis, shape [x.shape[axis]], each +1 or -1 (not checked: reading them would
            synchronise with the GPU), any real dtype.
        scale: None is 1/sqrt(block).
        transpose: rotate by H^T.

    Returns:
        Same shape, dtype and device as x.

    Raises:
        ValueError: integer or complex x, a block that does not fit the axis, signs of another shape or device.
        IndexError: axis out of range.
        RuntimeError: x is on a GPU and the kernels are not built.
    """
    return _transform(x, axis, block, scale, transpose, signs, None)


def random_rotation(
    x: Tensor, seed: int, *, axis: int = -1, block: int | None = None, rounds: int = 1, inverse: bool = False
) -> Tensor:
    """A Hadamard rotation with random signs: x D H for one round, x D1 H D2 H for two, H orthonormal.

    The signs depend on the seed and the length of the axis alone (SHAKE-128), not on the device, the rank or the versions of
    anything. One round spreads any input over its block; a second one makes each coordinate of the result look Gaussian, even
    for a one-hot x (Zilca and Mendelson, arXiv 2604.23418). Differentiable in x.

    Two rounds of a power of two from 64 along the last axis, x of 16 or 32 bits, are one pass over memory with one rounding
    to the dtype of x. Anything else is a pass and a rounding for each round.

    Args:
        x: as for :func:`hadamard_transform`, as are axis and block.
        rounds: 1 or 2.
        inverse: undo the rotation of the same seed: the same matrices, transposed and in reverse order.

    Raises:
        ValueError: other rounds; as hadamard_transform.
    """
    if rounds not in (1, 2):
        raise ValueError(f"random_rotation: rounds must be 1 or 2; got {rounds}")
    n = x.shape[_check_axis("random_rotation", x, axis)]
    size = largest_block(n) if block is None else block
    if rounds == 2 and _both_rounds(x, axis, size):
        first, middle = (_bits_on(x, n, seed, r) for r in range(2))
        signs = (None, middle, first) if inverse else (first, middle, None)
        return ops.hadamard_rounds(x.movedim(axis, -1), size, 1.0 / size, *signs).movedim(-1, axis)
    order = [(seed, r) for r in range(rounds)]
    for key in reversed(order) if inverse else order:
        if inverse:
            x = _transform(x, axis, block, None, True, None, _signs_on(x, n, *key, torch.float32))
        else:
            x = _transform(x, axis, block, None, False, _signs_on(x, n, *key, x.dtype), None)
    return x


def random_signs(n: int, seed: int, stream: int = 0) -> Tensor:
    """n signs that depend on the seed and the stream (the number of a round): int8 +-1 [n] on the CPU."""
    return signs_of_seed(n, seed, stream)


def _both_rounds(x: Tensor, axis: int, block: int) -> bool:
    """Whether one kernel does both rounds."""
    power_of_two = ops.MIN_ROUNDS_BLOCK <= block <= ops.MAX_BLOCK and block & (block - 1) == 0
    return (
        power_of_two
        and x.shape[axis] % block == 0
        and x.element_size() <= 4
        and not _column_kernel(x, axis, block)
    )


def _check_axis(op: str, x: Tensor, axis: int) -> int:
    ops.check_input(op, x)
    if not -x.dim() <= axis < x.dim():
        raise IndexError(
            f"{op}: axis must be in [{-x.dim()}, {x.dim() - 1}] for {x.dim()} dimensions; got {axis}"
        )
    return axis


def _transform(
    x: Tensor,
    axis: int,
    block: int | None,
    scale: float | None,
    transpose: bool,
    signs: Tensor | None,
    out_signs: Tensor | None,
) -> Tensor:
    """:func:`hadamard_transform` with signs before the transform, or after it."""
    n = x.shape[_check_axis("hadamard_transform", x, axis)]
    if block is None:
        block = largest_block(n)
    order = _matrix_order(block, n)
    if scale is None:
        scale = 1.0 / math.sqrt(block) if block > 0 else 1.0
    if _column_kernel(x, axis, block):
        here = axis % x.dim()
        outer, inner = math.prod(x.shape[:here]), math.prod(x.shape[here + 1 :])
        y = ops.hadamard_axis(x.view(outer, n, inner), block, scale, signs)
        return (y if out_signs is None else y * out_signs.to(y.dtype)[:, None]).view(x.shape)
    y = x.movedim(axis, -1)
    if order == 1:
        return ops.hadamard(y, block, scale, signs, out_signs).movedim(-1, axis)
    if not x.is_cuda:
        fused = order
    else:
        fused = _kernel_order(order, block // order, x.device) if x.element_size() == 2 else 0
    if fused:
        # Row vectors: y = x H, so the matrix that acts on columns is H^T.
        matrix = _matrix_on(order, fused // order, not transpose, x.device, x.dtype)
        return ops.hadamard(y, block, scale, signs, out_signs, matrix).movedim(-1, axis)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = ops.hadamard(y.to(wide), block // order, scale, signs).unflatten(-1, (-1, order, block // order))
    y = (_matrix_on(order, 1, not transpose, x.device, wide) @ y).flatten(-3)
    return (y if out_signs is None else y * out_signs).to(x.dtype).movedim(-1, axis)


def _column_kernel(x: Tensor, axis: int, block: int) -> bool:
    """Whether a GPU transforms an axis that is not the last where it lies: pairs of columns, dense."""
    last = axis % x.dim() == x.dim() - 1
    power_of_two = 1 < block <= ops.MAX_BLOCK and block & (block - 1) == 0 and x.shape[axis] % block == 0
    even = x.shape[-1] % 2 == 0
    return x.is_cuda and not last and power_of_two and x.is_contiguous() and x.element_size() <= 4 and even


@functools.cache
def _build_matrix(
    order: int, power: int, transpose: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    h = hadamard_matrix(order)
    h = (h.t() if transpose else h).contiguous()
    while h.shape[0] < order * power:
        h = torch.kron(h, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    return h.to(device, dtype)


def _matrix_on(order: int, power: int, transpose: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """H_order kron Sylvester(power), or its transpose."""
    return _build_matrix(order, power, transpose, device, dtype)


# In a compiled graph signs come from an operator, which hands out a copy. As constants, torch.compile takes those of one
# call only.
def _signs_on(x: Tensor, n: int, seed: int, stream: int, dtype: torch.dtype) -> Tensor:
    """:func:`random_signs` where x is."""
    if torch.compiler.is_compiling():
        return ops.random_signs(x, n, seed, stream).to(dtype)
    return kept_signs(n, seed, stream, x.device, dtype)


def _bits_on(x: Tensor, n: int, seed: int, stream: int) -> Tensor:
    """The same as bits."""
    if torch.compiler.is_compiling():
        return ops.random_bits(x, n, seed, stream)
    return kept_bits(n, seed, stream, x.device)


# torch.compile calls this function and takes what it returns as a constant, as under
# torch.compiler.assume_constant_result, which would import the compiler here.
_matrix_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kernel_order(order: int, power: int, device: torch.device) -> int:
    """The order m 2^j for which the kernel does m 2^k in one pass; 0 if there is none."""
    # The tensor cores take rows by 16: of 2 x 16, an order of 20 would leave much unused; of 3 x 16, 40 does not.
    while power > _largest_power(order) or (order == 20 and power > ops.MATRIX_POWERS[0]):
        order, power = 2 * order, power // 2
    if order > ops.MAX_ORDER or power not in ops.MATRIX_POWERS:
        return 0
    # Large blocks: float32 and the raw input, both with gaps, of rows by 16.
    needed = -(-order // 16) * 16 * power * 6.5 if power > 256 else 0
    return order if needed <= _shared_memory(device) else 0


def _largest_power(order: int) -> int:
    return ops.MATRIX_POWERS[-1 if 16 < order <= 32 else -2]


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a thread block can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _matrix_order(block: int, n: int) -> int:
    """The m of block = m 2^k; 1 for powers of two, whose limits the operator checks."""
    if block < 1 or block & (block - 1) == 0:
        return 1
    for order in ORDERS:
        power, rest = divmod(block, order)
        if rest == 0 and power & (power - 1) == 0 and power <= ops.MAX_BLOCK and n % block == 0:
            return order
    raise ValueError(
        f"hadamard_transform: block must divide the axis of length {n} and be a power of two, at most {ops.MAX_BLOCK}, or "
        f"one of {', '.join(map(str, ORDERS))} times a power of two; got {block}; the largest power of two is "
        f"{largest_block(n)}"
    )
