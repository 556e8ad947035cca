"""Statistics of tensors and of products, on the device and without waiting for it: 0-dimensional tensors out, in float64.

Rounding is compared in rows: tokens of X, E, Y and dX, output channels of W, columns of dW. A row without signal (padding)
or whose exact values are not finite has no signal-to-noise ratio and does not count; a row that only its rounding made
non-finite counts as -300 dB, one that is exact as 300 dB.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PRODUCT_STATS = ("sqnr_db", "median_db", "p10_db", "min_db", "cosine", "bias")
"""Of one product against the same in high precision; see docs/metrics.md."""

ROUNDING_STATS = ("kurtosis", "underflow", "saturation", "sqnr_db", "median_db", "p10_db", "min_db")
"""Of sampled rows before and after they are rounded."""

WHOLE_STATS = ("amax", "rms", "crest")
OUTLIER_STATS = ("row_outliers", "column_outliers")

HISTOGRAM_BINS = 32
"""Binary orders of magnitude below the largest value; the last bin holds all that is smaller still."""

DB_LIMIT = 300.0

_QUANTILES = (0.5, 0.1, 0.0)


class WholeTensor(NamedTuple):
    """Reductions of a matrix [R, Q] in a few passes over its own dtype; sums are of x times ``unit``, a power of two."""

    unit: Tensor
    """Brings amax into [0.5, 1), so that float32 sums of squares neither under- nor overflow."""
    row_amax: Tensor
    """[R] in the dtype of x and not scaled; what follows is float64: [R], [R], [Q], [Q]."""
    row_squares: Tensor
    row_sum: Tensor
    col_squares: Tensor
    col_sum: Tensor

    def amax(self) -> Tensor:
        return self.row_amax.max()

    def rms(self, row_scale: Tensor | None = None, col_scale: Tensor | None = None) -> Tensor:
        """Of diag(row_scale) x or x diag(col_scale), float64."""
        squares, scale = (self.row_squares, row_scale) if col_scale is None else (self.col_squares, col_scale)
        total = (squares if scale is None else squares * scale.double().square()).sum()
        return (total / (self.row_squares.numel() * self.col_squares.numel())).sqrt() / self.unit

    def stats(self) -> Tensor:
        """[6]: amax, rms, crest, share of rows with NaN or inf, row and column outliers."""
        amax, rms = self.amax().double(), self.rms()
        broken = (~torch.isfinite(self.row_squares)).double().mean()
        rows, columns = self.row_squares.numel(), self.col_squares.numel()
        row_variance = _variance(self.row_squares, self.row_sum, columns)
        col_variance = _variance(self.col_squares, self.col_sum, rows)
        return torch.stack(
            [
                amax,
                rms,
                amax / rms,
                broken,
                outlier_statistic(row_variance, columns),
                outlier_statistic(col_variance, rows),
            ]
        )

    @staticmethod
    def of(x: Tensor) -> WholeTensor:
        """x: [R, Q], any floating-point dtype, both dimensions at least 1."""
        row_amax = torch.linalg.vector_norm(x, math.inf, dim=1)
        amax = row_amax.max().double()
        usable = torch.isfinite(amax) & (amax > 0)
        unit = torch.where(usable, torch.ldexp(torch.ones_like(amax), -torch.frexp(amax).exponent), 1.0)
        # bfloat16 has the exponents of float32: scaling by a power of two is exact in it and halves the traffic.
        wide = torch.promote_types(x.dtype, torch.float32)
        z = (x if x.dtype == torch.bfloat16 else x.to(wide)) * unit.to(wide)
        return WholeTensor(
            unit,
            row_amax,
            torch.linalg.vector_norm(z, 2, dim=1, dtype=wide).double().square(),
            z.sum(1, dtype=wide).double(),
            torch.linalg.vector_norm(z, 2, dim=0, dtype=wide).double().square(),
            z.sum(0, dtype=wide).double(),
        )


def outlier_statistic(variances: Tensor, samples: int) -> Tensor:
    """How unequal the variances of rows (or columns) are: 1 for independent Gaussians, large when few rows are hot.

    cv / sqrt(2 / (samples - 1)), cv = standard deviation over mean: AdaHOP's detection statistic (arXiv 2604.02525).

    Args:
        variances: [R] variance of each row. samples: elements in a row.
    """
    cv = variances.std() / variances.mean()
    return cv / math.sqrt(2 / (samples - 1)) if samples > 1 else cv * math.nan


def matrix_outliers(x: Tensor) -> Tensor:
    """[2]: row and column outlier statistic of x [R, Q]."""
    return torch.stack([outlier_statistic(x.var(1), x.shape[1]), outlier_statistic(x.var(0), x.shape[0])])


def rounding_stats(before: Tensor, after: Tensor, saturated: Tensor) -> Tensor:
    """[T, 7] in the order of :data:`ROUNDING_STATS`.

    Args:
        before, after: [T, R, Q] float64, values of sampled rows before and after rounding.
        saturated: [T, R, Q] bool, at the largest value of the format.
    """
    square = before.square()
    scale = square.mean((-2, -1))
    kurtosis = (square / scale[:, None, None]).square().mean((-2, -1))
    # Zeros (padding) have nothing to lose: shares are of the nonzero elements.
    nonzero = before != 0
    count = nonzero.sum((-2, -1)).clamp(min=1).double()
    underflow = (nonzero & (after == 0)).sum((-2, -1)) / count
    saturation = (nonzero & saturated).sum((-2, -1)) / count
    norm_wise, per_row = _sqnr(before, after)
    return torch.stack([kurtosis, underflow, saturation, norm_wise, *_spread(per_row)], -1)


def product_stats(exact: Tensor, approximate: Tensor) -> Tensor:
    """[T, 6] in the order of :data:`PRODUCT_STATS`.

    Args:
        exact: [R, Q] float64. approximate: [T, R, Q] float64, the same product with T roundings.
    """
    norm_wise, per_row = _sqnr(exact.expand_as(approximate), approximate)
    overlap = (approximate * exact).sum((-2, -1))
    energy, own = exact.square().sum(), approximate.square().sum((-2, -1))
    return torch.stack(
        [norm_wise, *_spread(per_row), overlap / (energy * own).sqrt(), overlap / energy - 1], -1
    )


def exponent_histogram(x: Tensor) -> Tensor:
    """Shares of the nonzero finite elements by binary order below the largest, [HISTOGRAM_BINS].

    Bin 0 holds the elements with the exponent of amax, bin b those with an exponent b lower.
    """
    exponent = torch.frexp(x).exponent.to(torch.float32)
    counted = torch.isfinite(x) & (x != 0)
    top = torch.where(counted, exponent, -math.inf).max()
    order = torch.where(counted, (top - exponent).clamp(max=HISTOGRAM_BINS - 1), -1.0)
    counts = torch.histc(order, HISTOGRAM_BINS, -0.5, HISTOGRAM_BINS - 0.5)
    return (counts / counts.sum().clamp(min=1)).double()


def _variance(squares: Tensor, total: Tensor, count: int) -> Tensor:
    return ((squares - total.square() / count) / max(count - 1, 1)).clamp(min=0)


def _sqnr(exact: Tensor, approximate: Tensor) -> tuple[Tensor, Tensor]:
    """Norm-wise SQNR [T] and that of every row [T, R], in dB; NaN where there is none."""
    signal, noise = exact.square().sum(-1), (approximate - exact).square().sum(-1)
    per_row = _decibel(signal, noise)
    per_row = torch.where(torch.isfinite(noise), per_row, -DB_LIMIT)
    per_row = torch.where(torch.isfinite(signal) & (signal > 0), per_row, math.nan)
    total = signal.sum(-1)
    return torch.where(total > 0, _decibel(total, noise.sum(-1)), math.nan), per_row


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return (10 * torch.log10(signal / noise)).clamp(-DB_LIMIT, DB_LIMIT)


def _spread(per_row: Tensor) -> list[Tensor]:
    """Median, tenth percentile and minimum of [T, R] over the rows that are not NaN; NaN where there is none."""
    # torch.nanquantile sorts again for every quantile, and takes several only as a tensor that has to be sent over.
    ordered = per_row.sort(-1).values
    last = (~torch.isnan(per_row)).sum(-1, keepdim=True) - 1
    found = []
    for quantile in _QUANTILES:
        position = (quantile * last.double()).clamp(min=0)
        low = position.floor().long()
        high = torch.minimum(low + 1, last.clamp(min=0))
        below, above = ordered.gather(-1, low), ordered.gather(-1, high)
        found.append((below + (above - below) * (position - low)).squeeze(-1))
    return found
