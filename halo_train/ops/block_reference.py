"""Gradients and weights in e4m3 with scales for blocks of the contraction, in plain PyTorch; see :mod:`halo_train.ops.reference`.

Operand E of dgrad and of wgrad has one scale for each row and each block of SCALE_BLOCK elements of the contraction, so that a GPU
rounds it both ways in one read; W of dgrad has one for each tile of SCALE_BLOCK x SCALE_BLOCK. Scales are powers of 16, which products
exchange for one another without an error. Values pass through bfloat16, in which the GPU keeps them between the two ways: what is wider
is rounded twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused_reference import gated_gradients
from .reference import QMAX, SCALE_BLOCK

MIN_EXPONENT = -60
"""The smallest scale is 2^this. A product's sums, up to 2^40 in units of a block's scale, stay finite on their way from scales up to
2^27, which hold 6e10, to the smallest."""


def quantize_grad_blocks(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both rounded forms of a gradient, rows of E diag(col_scale) and rows of (diag(row_scale) E)^T, and its column sums.

    Args:
        e: [M, N]; col_scale: [N], or None for ones; row_scale: [M].
        dtype: float8_e4m3fn.
        column_sums: also sum the columns of E, which is a bias gradient; the order of the sum is the implementation's.

    Returns:
        a [M, N], its scales [ceil(N / SCALE_BLOCK), M], b [N, M], its scales [ceil(M / SCALE_BLOCK), N], sums [N] or [0], in
        float32 (sums of float64 E in float64): E diag(col_scale) is near a times the scales of its blocks. The scale of a block with
        inf or NaN is NaN, of zeros alone 1.
    """
    wide = torch.promote_types(e.dtype, torch.float32)
    sums = e.sum(0, dtype=wide) if column_sums else e.new_empty(0, dtype=wide)
    y = e.to(torch.bfloat16)
    return (*_round_blocks(y, col_scale, dtype), *_round_blocks(y.t(), row_scale, dtype), sums)


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
    """Backward of h = act(gate) * up: :func:`fused_reference.gated_grad_quantize` with scales of :func:`quantize_grad_blocks`."""
    dgate, dup = (t.to(torch.bfloat16) for t in gated_gradients(dh, gate, up, activation))
    return (
        *_round_blocks(dgate, gate_col_scale, dtype),
        *_round_blocks(dup, up_col_scale, dtype),
        *_round_blocks(dgate.t(), row_scale, dtype),
        *_round_blocks(dup.t(), row_scale, dtype),
    )


def quantize_tiles(
    x: Tensor,
    dtype: torch.dtype,
    divisor: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of (diag(row_scale / divisor) x diag(col_scale))^T with a scale for each tile of SCALE_BLOCK x SCALE_BLOCK, powers of 16 as in
    :func:`quantize_grad_blocks`, with a divisor 8 times such a power.

    Args:
        x: [N, K]; divisor, row_scale: [N], col_scale: [K], or None for ones.
        dtype: float8_e4m3fn.

    Returns:
        data [K, N], scales [ceil(N / SCALE_BLOCK), ceil(K / SCALE_BLOCK)] in float32. The scale of a tile with inf or NaN is NaN, of
        zeros alone 1, with a divisor 8.
    """
    y, factors, base = x.to(torch.bfloat16).t(), row_scale, 1.0
    if divisor is not None:
        # Rows divided by their scale have an RMS near 448 / 4: 8 holds 32 times that, as a rule in all tiles.
        base = 8.0
        factors = divisor.float().reciprocal() / base
        factors = factors if row_scale is None else factors * row_scale.float()
    of_rows = None if col_scale is None else col_scale[:, None]
    scaled = y if factors is None else y * factors.to(y.dtype)
    scaled = scaled if of_rows is None else scaled * of_rows.to(y.dtype)
    tiles = _tiles(_tiles(scaled).transpose(0, 2)).abs()  # [inside, blocks, tiles, inside]
    amax = tiles.amax((0, 3)) if x.numel() else y.new_zeros(tiles.shape[1:3])
    scale, inverse = _power_scales(amax)
    expanded = inverse.t().repeat_interleave(SCALE_BLOCK, dim=0).repeat_interleave(SCALE_BLOCK, dim=1)
    return _round(y, expanded[: y.shape[0], : y.shape[1]], factors, dtype, of_rows), scale * base


def _tiles(y: Tensor) -> Tensor:
    """The last axis in parts of SCALE_BLOCK, zeros after the last."""
    return F.pad(y, (0, -y.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))


def _round_blocks(y: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """bfloat16 rows of y diag(factors) [R, C] with a scale for each block: q [R, C] and scales [ceil(C / SCALE_BLOCK), R]."""
    scale, inverse = _block_scales(y if factors is None else y * factors.to(y.dtype))
    inverse = inverse.repeat_interleave(SCALE_BLOCK, dim=1)[:, : y.shape[1]]
    return _round(y, inverse, factors, dtype), scale.t().contiguous()


def _round(
    y: Tensor, inverse: Tensor, factors: Tensor | None, dtype: torch.dtype, of_rows: Tensor | None = None
) -> Tensor:
    """bfloat16 y diag(factors) [R, C] times inverse [R, C], and then times of_rows [R, 1]."""
    values = (y * inverse).float()  # the inverse before the factors: exact, in bfloat16
    for each in (factors, of_rows):
        if each is not None:
            values = values * each.float()
    return values.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype).contiguous()


def _block_scales(y: Tensor) -> tuple[Tensor, Tensor]:
    """Of bfloat16 y [R, C] the scales [R, blocks], and what blocks are multiplied by: :func:`_power_scales`."""
    return _power_scales(_tiles(y).abs().amax(2) if y.shape[1] else y.new_zeros(y.shape[0], 0))


def _power_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """Of bfloat16 amax the scales in float32, and what blocks are multiplied by, in bfloat16.

    2^k with k the smallest multiple of 4, at least MIN_EXPONENT, with amax <= 448 2^k: 448 = 1.75 2^8, so that k is the exponent of amax
    less 8, plus 1 above 1.75, and up to a multiple of 4; with the bias of 127, to where both lowest bits are set.
    """
    bits = torch.where(amax.isnan(), 0, amax.view(torch.int16).int())
    biased = ((bits + 0x1F >> 7) - 8).clamp(min=127 + MIN_EXPONENT) | 3
    scale = (biased << 23).view(torch.float32)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    scale = torch.where(amax.isfinite(), scale, torch.full_like(scale, torch.nan))
    return scale, (254 - biased << 7).short().view(torch.bfloat16)
