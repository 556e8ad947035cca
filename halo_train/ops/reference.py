"""Every kernel op in plain PyTorch: the definition of correct, the CPU implementation and the oracle of the tests.

Contract shared with the kernels (docs/numerics.md, section 4): arithmetic in float32 (float64 for float64 input), one
multiplication by the normalisation, one rounding at the end; amax 0 gives scale 1; a row with inf or NaN gets a
non-finite scale, so that exactly this row of a product is non-finite; out-of-range values saturate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QMAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
"""Largest magnitude that a quantised row uses. Other dtypes are stored unrounded, scaled to 1."""

INT8_MAX_CONTRACTION = 131072
"""127 * 127 * 131072 < 2^31: longer int8 contractions are split so that an int32 sum cannot overflow."""

_INT_MM_MIN_ROWS = 32
"""torch._int_mm on CUDA requires more than 16 rows."""

SCALE_BLOCK = 256
"""Elements of a contraction that share a scale, where rows have a scale for each block of it (csrc/quantize.h, kScaleBlock)."""

AMAX_FLOOR = 2.0**-100
"""amax below this is taken as this, so that QMAX / amax stays finite in float32."""


def hadamard(
    x: Tensor,
    block: int,
    scale: float,
    signs: Tensor | None = None,
    out_scale: Tensor | None = None,
    matrix: Tensor | None = None,
) -> Tensor:
    """scale * (x diag(signs)) (I kron H) diag(out_scale) over the last axis.

    H is the +-1 Sylvester matrix of order ``block``, or matrix^T kron the Sylvester matrix of order block / m.

    Args:
        x: [..., n], floating point; ``block`` divides n and is a power of two times m.
        signs: [n], +1 or -1, any real dtype.
        out_scale: [n], any real dtype; float32 is kept.
        matrix: [m, m] of +-1 in the dtype of x.

    Returns:
        Same shape and dtype, contiguous; rounded once, after the factors.
    """
    y = x.to(_compute_dtype(x))
    if signs is not None:
        y = y * signs.to(y.dtype)
    factor = scale if out_scale is None else out_scale.to(y.dtype) * scale
    if matrix is None:
        y = _butterflies(y, block)
    else:
        m = matrix.shape[0]
        y = _butterflies(y, block // m).unflatten(-1, (-1, m, block // m))
        y = (matrix.to(y.dtype) @ y).flatten(-3)
    return (y * factor).to(x.dtype).contiguous()


def hadamard_(
    x: Tensor,
    block: int,
    scale: float,
    signs: Tensor | None = None,
    out_scale: Tensor | None = None,
    matrix: Tensor | None = None,
) -> None:
    """:func:`hadamard` in place."""
    x.copy_(hadamard(x, block, scale, signs, out_scale, matrix))


def hadamard_rounds(
    x: Tensor, block: int, scale: float, first: Tensor | None, middle: Tensor, last: Tensor | None
) -> Tensor:
    """scale * x diag(first) (I kron H) diag(middle) (I kron H) diag(last) over the last axis, rounded once.

    Args:
        x: [..., n], floating point; ``block`` divides n and is a power of two.
        first: uint8 [n / 8], bit i % 8 of byte i / 8 set where sign i is -1; None is no signs. Likewise middle and last.

    Returns:
        Same shape and dtype, contiguous.
    """
    y = x.to(_compute_dtype(x))
    if first is not None:
        y = y * signs_of_bits(first).to(y.dtype)
    y = _butterflies(_butterflies(y, block) * signs_of_bits(middle).to(y.dtype), block) * scale
    if last is not None:
        y = y * signs_of_bits(last).to(y.dtype)
    return y.to(x.dtype).contiguous()


def hadamard_rounds_(
    x: Tensor, block: int, scale: float, first: Tensor | None, middle: Tensor, last: Tensor | None
) -> None:
    """:func:`hadamard_rounds` in place."""
    x.copy_(hadamard_rounds(x, block, scale, first, middle, last))


def signs_of_bits(bits: Tensor) -> Tensor:
    """int8 +-1 [8 n] of uint8 [n]: -1 where bit i % 8 of byte i / 8 is set."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return 1 - 2 * (bits[:, None] >> shifts & 1).reshape(-1).to(torch.int8)


def hadamard_axis(x: Tensor, block: int, scale: float, signs: Tensor | None = None) -> Tensor:
    """:func:`hadamard` along the middle axis of x [outer, n, inner]; the result is contiguous."""
    return hadamard(x.transpose(1, 2), block, scale, signs).transpose(1, 2).contiguous()


def quantize_rows(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of (x diag(col_scale)) H_block in 8 bits with one scale a row.

    Args:
        x: [M, K], floating point.
        dtype: float8_e4m3fn, float8_e5m2, int8, or float32/float64 for no rounding.
        block: order of the orthonormal rotation along K; 1 is none.
        col_scale: [K] or None; positive powers of two before a rotation (the GPU may look at their exponents alone there).

    Returns:
        q [M, K] of ``dtype`` and scale [M] float32 (float64 for float64 input), with y ~= q * scale[:, None].
    """
    y = _prepare(x, block, col_scale)
    return _round(y, y.abs().amax(dim=1) if y.shape[1] else y.new_zeros(y.shape[0]), dtype)


def quantize_rows_transposed(
    x: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of (diag(row_scale) x)^T in 8 bits with one scale a row of the result.

    Args:
        x: [M, N], floating point.
        row_scale: [M], or None for ones.

    Returns:
        q [N, M] contiguous of ``dtype`` and scale [N].
    """
    y = x.to(_compute_dtype(x)).t()
    if row_scale is not None:
        y = y * row_scale.to(y.dtype)
    q, scale = _round(y, y.abs().amax(dim=1) if y.shape[1] else y.new_zeros(y.shape[0]), dtype)
    return q.contiguous(), scale


def quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both rounded forms of a gradient, rows of E diag(col_scale) and rows of (diag(row_scale) E)^T, and its column sums.

    Args:
        e: [M, N]; col_scale: [N], or None for ones; row_scale: [M].
        column_sums: also sum the columns of E, which is a bias gradient; the order of the sum is the implementation's.

    Returns:
        a [M, N], its scale [M], b [N, M], its scale [N], sums [N] or [0] in float32 (float64 for float64 E).
    """
    wide = _compute_dtype(e)
    sums = e.sum(0, dtype=wide) if column_sums else e.new_empty(0, dtype=wide)
    return (*quantize_rows(e, dtype, 1, col_scale), *quantize_rows_transposed(e, dtype, row_scale), sums)


def transpose_bytes(x: Tensor) -> Tensor:
    """x [M, N] of one-byte elements as a contiguous [N, M]."""
    return x.t().clone(memory_format=torch.contiguous_format)


def equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """2^exponent and 2^-exponent, exact.

    Args:
        exponent: [K] int8.

    Returns:
        Twice [K] float32.
    """
    return torch.exp2(exponent.float()), torch.exp2(-exponent.float())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """What the statistics of a matrix need of it, in float64: squares stay in its range whatever x holds.

    Args:
        x: [R, Q], floating point.

    Returns:
        [3, R]: the largest magnitude, the sum and the sum of squares of each row; [2, Q]: the sum and the sum of squares of
        each column. NaN in x is NaN in all of them.
    """
    y = x.double()
    square = y.square()
    largest = y.abs().amax(1) if x.shape[1] else y.new_zeros(x.shape[0])
    return torch.stack([largest, y.sum(1), square.sum(1)]), torch.stack([y.sum(0), square.sum(0)])


EXPONENTS = 277
"""Binary orders that float32 has, from -149, that of its smallest value, to 127."""


def rounding_moments(
    x: Tensor, data: Tensor, scale: Tensor, largest: float, counted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the statistics of rounded matrices need of them, in float64.

    Args:
        x: [B, R, Q], floating point, before rounding. data: [B, R, Q], what was stored of it. scale: [B, R], of the rows.
        largest: magnitude from which on data counts as saturated. counted: every so manieth row has its exponents counted.

    Returns:
        [B, 7, R], of each row: the sum, the sums of squares and of fourth powers, the sum of squared errors of ``data * scale``,
        and how many elements are not zero in x and in ``data * scale``, and saturated; [B, 2, Q]: the sum and the sum of
        squares of each column; [B, EXPONENTS] int32: how many elements of x have each binary order as float32, zeros, inf and NaN
        none.
    """
    before = x.double()
    # Not every device can multiply or compare float8.
    stored = data.double()
    after, square = stored * scale.double()[..., None], before.square()
    of_rows = (
        before.sum(-1),
        square.sum(-1),
        square.square().sum(-1),
        (after - before).square().sum(-1),
        (before != 0).sum(-1, dtype=torch.float64),
        (after != 0).sum(-1, dtype=torch.float64),
        (stored.abs() >= largest).sum(-1, dtype=torch.float64),
    )
    of_columns = torch.stack([before.sum(-2), square.sum(-2)], 1)
    few = x[:, ::counted].float().flatten(1)
    order = torch.frexp(few).exponent.long() + 148
    order = torch.where(torch.isfinite(few) & (few != 0), order, EXPONENTS)
    counts = few.new_zeros((len(x), EXPONENTS + 1), dtype=torch.int32)
    counts.scatter_add_(1, order, torch.ones_like(order, dtype=torch.int32))
    return torch.stack(of_rows, 1), of_columns, counts[:, :EXPONENTS]


def quantize_tensor(
    x: Tensor, dtype: torch.dtype, block: int = 1, col_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_rows` with one scale for the whole tensor, shape []."""
    y = _prepare(x, block, col_scale)
    return _round(y, y.abs().amax() if y.numel() else y.new_zeros(()), dtype)


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool = True
) -> Tensor:
    """diag(scale_a) (a b^T) diag(scale_b) in float32, in float64 for float64 operands or results.

    Args:
        a: [M, K] and b: [N, K], both quantised.
        scale_a: [M], [] or [ceil(K / SCALE_BLOCK), M], powers of two: one for each row and block of K.
        scale_b: [N], [] or, with such a scale_a, [ceil(K / SCALE_BLOCK), ceil(N / SCALE_BLOCK)], powers of two: one for each tile.
        fast_accum: what a GPU may do with its sums, see :func:`halo_train.gemm.matmul`; not here.

    Returns:
        [M, N] of ``out_dtype``.
    """
    if a.dtype == torch.int8:
        return int8_matmul(a, b, scale_a, scale_b, out_dtype)
    wide = torch.float64 if torch.float64 in (a.dtype, out_dtype) else torch.float32
    if scale_a.dim() == 2:
        a = a.to(wide) * scale_a.to(wide).t().repeat_interleave(SCALE_BLOCK, dim=1)[:, : a.shape[1]]
        scale_a = scale_a.new_ones(())
    if scale_b.dim() == 2:
        tiles = (
            scale_b.to(wide).t().repeat_interleave(SCALE_BLOCK, dim=0).repeat_interleave(SCALE_BLOCK, dim=1)
        )
        b = b.to(wide) * tiles[: b.shape[0], : b.shape[1]]
        scale_b = scale_b.new_ones(())
    return _scale_product(a.to(wide) @ b.to(wide).t(), scale_a, scale_b, out_dtype)


def int8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """:func:`scaled_matmul` of int8 operands by the library's int8 GEMM: int32 sums, float64 beyond their range."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    return _scale_product(_int8_sums(a, b, wide), scale_a, scale_b, out_dtype)


def matmul_rows(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fast_accum: bool = True
) -> Tensor:
    """diag(scale_a) (a b) diag(scale_b), [M, N] from a [M, K] and b [K, N]: scales as in
    :func:`scaled_matmul`."""
    return scaled_matmul(a, b.t().contiguous(), scale_a, scale_b, out_dtype)


def copy_after(x: Tensor, e: Tensor) -> Tensor:
    """A copy of x; to a compiler it depends on e."""
    return x.clone()


def _scale_product(product: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    row = scale_a.to(product.dtype)
    row = row[:, None] if row.dim() else row
    return (product * row * scale_b.to(product.dtype)).to(out_dtype)


def _int8_sums(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    rows = a.shape[0]
    if a.is_cuda and rows < _INT_MM_MIN_ROWS:
        a = torch.nn.functional.pad(a, (0, 0, 0, _INT_MM_MIN_ROWS - rows))
    if a.shape[1] <= INT8_MAX_CONTRACTION:
        return torch._int_mm(a, b.t())[:rows].to(wide)
    parts = zip(a.split(INT8_MAX_CONTRACTION, dim=1), b.split(INT8_MAX_CONTRACTION, dim=1), strict=True)
    total = sum(torch._int_mm(p.contiguous(), q.t())[:rows].double() for p, q in parts)
    assert isinstance(total, Tensor)
    return total.to(wide)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _prepare(x: Tensor, block: int, col_scale: Tensor | None) -> Tensor:
    y = x.to(_compute_dtype(x))
    if col_scale is not None:
        y = y * col_scale.to(y.dtype)
    return _butterflies(y, block) * (1.0 / math.sqrt(block)) if block > 1 else y


def _butterflies(y: Tensor, block: int) -> Tensor:
    # Additions only: unlike a product with H, not subject to TF32 or to the order in which a BLAS sums.
    shape, half = y.shape, 1
    while half < block:
        y = y.reshape(-1, 2, half)
        a, b = y[:, 0], y[:, 1]
        y = torch.stack((a + b, a - b), dim=1)
        half *= 2
    return y.reshape(shape)


def scales_of(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales that map amax, of rows or of a tensor, to the largest value of ``dtype``, and what values are multiplied by."""
    # A tensor, not a number: PyTorch divides by a number through its reciprocal, which rounds twice.
    qmax = torch.full_like(amax, QMAX.get(dtype, 1.0))
    floored = amax.clamp(min=AMAX_FLOOR)
    return torch.where(amax == 0, torch.ones_like(amax), floored / qmax), qmax / floored


def round_values(y: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """y [M, K], in the dtype of arithmetic, times ``inverse`` of :func:`scales_of`, [M] or [], rounded to ``dtype``."""
    y = y * (inverse[:, None] if inverse.dim() else inverse)
    if dtype == torch.int8:
        # NaN has no integer; its row is poisoned through the scale.
        y = torch.nan_to_num(y.round(), nan=0.0)
    if dtype in QMAX:
        y = y.clamp(-QMAX[dtype], QMAX[dtype])
    return y.to(dtype)


def _round(y: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale, inverse = scales_of(amax, dtype)
    return round_values(y, inverse, dtype), scale
