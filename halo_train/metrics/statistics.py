"""Statistics of tensors and of products, on the device and without waiting for it, in two stages.

While a layer runs, its tensors are reduced to a few sums by row, a handful of kernels each (:class:`Reduction`). At the end
of the step the sums of all layers are finished together, kind by kind, in batches: kernel launches, not arithmetic, would
otherwise be most of the cost.

Rounding is compared in rows: tokens of X, E, Y and dX, output channels of W, columns of dW. A row without signal (padding)
or whose exact values are not finite has no signal-to-noise ratio and does not count; a row that only its rounding made
non-finite counts as -300 dB, one that is exact as 300 dB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

DB_LIMIT = 300.0

HISTOGRAM_BINS = 32
"""Binary orders of magnitude below the largest value; the last bin holds all that is smaller still."""

HISTOGRAM_ROWS = 32
"""Of the sampled rows."""

_EXPONENTS = (-149, 128)
"""Of the smallest and the largest float32: range of the histogram before it is shifted to the largest value."""

_QUANTILES = (0.5, 0.1, 0.0)


class Reduction(NamedTuple):
    """Sums of one tensor or product from which its statistics are finished."""

    kind: str
    """Key of :data:`STATS_OF`."""
    sums: tuple[Tensor, ...]
    """Of tensors that were reduced together: the first axis is theirs, others are vectors over rows."""
    length: int = 0
    """Elements that a sum is over, where the kind needs it."""
    member: int = 0
    """Index of this tensor or product along the first axis."""


class WholeTensor(NamedTuple):
    """Reductions of a matrix [R, Q], float64, in one pass over it."""

    row_amax: Tensor
    row_sum: Tensor
    row_square: Tensor
    """Sums of squares, as col_square."""
    col_sum: Tensor
    col_square: Tensor
    amax: Tensor

    @staticmethod
    def of(x: Tensor) -> WholeTensor:
        """x: [R, Q], any floating-point dtype, both dimensions at least 1."""
        rows, columns = ops.moments(x)
        return WholeTensor(rows[0], rows[1], rows[2], columns[0], columns[1], rows[0].max())

    def scale(self, amax: Tensor, squares: Tensor) -> Reduction:
        """For amax, rms and crest of the matrix with its rows or columns scaled.

        Args:
            amax: [] of the scaled matrix.
            squares: its sums of squares: ``row_square`` or ``col_square`` times the squares of the factors.
        """
        return Reduction("scale", (amax[None], squares[None]), len(self.row_square) * len(self.col_square))

    def reductions(self) -> list[Reduction]:
        """For amax, rms, crest, nonfinite and both outlier statistics."""
        rows, columns = len(self.row_square), len(self.col_square)
        return [
            self.scale(self.amax, self.col_square),
            Reduction("rows", (self.row_square[None], self.row_sum[None]), columns),
            Reduction("columns", (self.col_square[None], self.col_sum[None]), rows),
        ]


# Below, T tensors of one shape are reduced together.


def outlier_reductions(rows: Tensor) -> list[list[Reduction]]:
    """For nonfinite and both outlier statistics of sampled rows [T, R, Q], float64."""
    square, (tensors, count, length) = rows.square(), rows.shape
    by_row, by_column = (square.sum(2), rows.sum(2)), (square.sum(1), rows.sum(1))
    return [
        [Reduction("rows", by_row, length, i), Reduction("columns", by_column, count, i)]
        for i in range(tensors)
    ]


def exponent_reductions(rows: Tensor) -> list[Reduction]:
    """For the histograms of exponents of sampled rows [T, R, Q]: of about HISTOGRAM_ROWS of them."""
    low, high = _EXPONENTS
    bins, few = high - low, rows[:, :: max(1, rows.shape[1] // HISTOGRAM_ROWS)]
    exponents = few.float().abs().log2().floor()
    # The bins of all tensors side by side; zeros (-inf), inf and NaN are in none.
    total = bins * len(rows)
    middle = torch.arange(0.5 - low, total - low, bins, device=rows.device)
    counts = torch.histc(exponents + middle[:, None, None], total, 0, total).view(len(rows), bins)
    return [Reduction("exponents", (counts,), member=i) for i in range(len(rows))]


def rounding_reductions(before: Tensor, after: Tensor, saturated: Tensor) -> list[Reduction]:
    """One for each of T tensors.

    Args:
        before, after: [T, R, Q] float64, values of sampled rows before and after rounding.
        saturated: [T, R, Q] bool, at the largest value of the format.
    """
    count = before[0].numel()
    square, elements = before.square(), (-2, -1)
    sums = (
        square.sum(-1).sqrt(),
        torch.linalg.vector_norm(after - before, dim=-1),
        # The number of elements is in the sum, so that tensors of all widths are finished together.
        math.sqrt(count) * torch.linalg.vector_norm(square, dim=elements),
        torch.linalg.vector_norm(before, 0, dim=elements),  # the number of elements that are not zero
        torch.linalg.vector_norm(after, 0, dim=elements),
        saturated.sum(elements, dtype=before.dtype),
    )
    return [Reduction("rounding", sums, member=i) for i in range(len(before))]


def product_reductions(exact: Tensor, approximate: Tensor) -> list[Reduction]:
    """One for each rounding of each product.

    Args:
        exact: [..., R, Q] float64. approximate: [..., R, Q] float64, several for one exact where that is broadcast.
    """
    noise = torch.linalg.vector_norm(approximate - exact, dim=-1)
    signal = torch.linalg.vector_norm(exact, dim=-1).expand_as(noise)
    overlap = (approximate * exact).sum((-2, -1))
    own = torch.linalg.vector_norm(approximate, dim=(-2, -1))
    sums = (signal.flatten(0, -2), noise.flatten(0, -2), overlap.flatten(), own.flatten())
    return [Reduction("product", sums, member=i) for i in range(len(sums[-1]))]


def finish(reductions: Sequence[Reduction]) -> list[list[float]]:
    """The statistics of each reduction in the order of :data:`STATS_OF` (32 shares for exponents).

    What is of one kind and shape is finished in one batch, and each device brings everything over in one transfer.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (kind, sums, length, _) in enumerate(reductions):
        key = (kind, length, *((s.shape[1:], s.dtype, s.device) for s in sums))
        groups.setdefault(key, []).append(i)
    finished: dict[torch.device, list[tuple[list[tuple[int, int]], Tensor]]] = {}
    for members in groups.values():
        first: dict[int, int] = {}  # row of each batch of sums among all of them
        batches, rows, count = [], [], 0
        for i in members:
            sums, member = reductions[i].sums, reductions[i].member
            if id(sums) not in first:
                first[id(sums)] = count
                batches.append(sums)
                count += len(sums[0])
            rows.append((i, first[id(sums)] + member))
        together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        stats = _FINISH[reductions[members[0]].kind](reductions[members[0]].length, *together)
        finished.setdefault(stats.device, []).append((rows, stats))
    found: list[list[float]] = [[] for _ in reductions]
    for parts in finished.values():
        numbers = torch.cat([stats.flatten() for _, stats in parts]).tolist()
        for rows, stats in parts:
            width = stats.shape[1]
            for i, row in rows:
                found[i] = numbers[row * width : (row + 1) * width]
            del numbers[: stats.numel()]
    return found


# Below, B is the number of tensors that are finished together.


def _finish_scale(count: int, amax: Tensor, squares: Tensor) -> Tensor:
    amax, rms = amax.double(), (squares.sum(-1) / count).sqrt()
    return torch.stack([amax, rms, amax / rms], -1)


def _finish_rows(columns: int, square: Tensor, total: Tensor) -> Tensor:
    variance = _variance(square, total, columns)
    return torch.stack([_outliers(variance, columns), (~torch.isfinite(variance)).double().mean(-1)], -1)


def _finish_columns(rows: int, square: Tensor, total: Tensor) -> Tensor:
    return _outliers(_variance(square, total, rows), rows)[:, None]


def _finish_rounding(
    _: int,
    signal: Tensor,
    noise: Tensor,
    fourth: Tensor,
    nonzero: Tensor,
    kept: Tensor,
    saturated: Tensor,
) -> Tensor:
    kurtosis = (fourth / signal.square().sum(-1)).square()
    # Zeros (padding) have nothing to lose: shares are of the nonzero elements.
    some = nonzero.clamp(min=1)
    underflow, saturation = (nonzero - kept) / some, saturated / some
    return torch.stack([kurtosis, underflow, saturation, *_sqnr(signal, noise)], -1)


def _finish_product(_: int, signal: Tensor, noise: Tensor, overlap: Tensor, own: Tensor) -> Tensor:
    exact = torch.linalg.vector_norm(signal, dim=-1)
    return torch.stack([*_sqnr(signal, noise), overlap / exact / own, overlap / exact / exact - 1], -1)


def _finish_exponents(_: int, counts: Tensor) -> Tensor:
    bins = torch.arange(counts.shape[-1], device=counts.device)
    top = torch.where(counts > 0, bins, 0).amax(-1, keepdim=True)
    order = top - bins[: HISTOGRAM_BINS - 1]
    counts = counts.double()
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    near = torch.where(order >= 0, shares.gather(-1, order.clamp(min=0)), 0.0)
    rest = shares.sum(-1, keepdim=True) - near.sum(-1, keepdim=True)
    return torch.cat([near, rest.clamp(min=0)], -1)


STATS_OF: dict[str, tuple[str, ...]] = {
    "scale": ("amax", "rms", "crest"),
    "rows": ("row_outliers", "nonfinite"),
    "columns": ("column_outliers",),
    "rounding": ("kurtosis", "underflow", "saturation", "sqnr_db", "median_db", "p10_db", "min_db"),
    "product": ("sqnr_db", "median_db", "p10_db", "min_db", "cosine", "bias"),
    "exponents": (),
}
"""Names of what each kind of reduction is finished to; docs/metrics.md defines them."""

_FINISH: dict[str, Callable[..., Tensor]] = {
    "scale": _finish_scale,
    "rows": _finish_rows,
    "columns": _finish_columns,
    "rounding": _finish_rounding,
    "product": _finish_product,
    "exponents": _finish_exponents,
}


def _outliers(variance: Tensor, samples: int) -> Tensor:
    """How unequal the variances [B, R] of rows of ``samples`` elements are: AdaHOP's statistic (arXiv 2604.02525).

    Standard deviation over mean, divided by sqrt(2 / (samples - 1)): 1 for independent Gaussians.
    """
    cv = variance.std(-1) / variance.mean(-1)
    return cv / math.sqrt(2 / (samples - 1)) if samples > 1 else cv * math.nan


def _variance(square: Tensor, total: Tensor, count: int) -> Tensor:
    return ((square - total.square() / count) / max(count - 1, 1)).clamp(min=0)


def _sqnr(signal: Tensor, noise: Tensor) -> list[Tensor]:
    """Norm-wise SQNR, then median, tenth percentile and minimum over rows [B, R], in dB; NaN where there is none."""
    per_row = torch.where(torch.isfinite(noise), _decibel(signal, noise), -DB_LIMIT)
    per_row = torch.where(torch.isfinite(signal) & (signal > 0), per_row, math.nan)
    total, lost = torch.linalg.vector_norm(signal, dim=-1), torch.linalg.vector_norm(noise, dim=-1)
    found = [torch.where(total > 0, _decibel(total, lost), math.nan)]
    # torch.nanquantile sorts again for every quantile, and takes several only as a tensor that has to be sent over.
    ordered = per_row.sort(-1).values
    last = (~torch.isnan(per_row)).sum(-1, keepdim=True) - 1
    for quantile in _QUANTILES:
        position = (quantile * last.double()).clamp(min=0)
        low = position.floor().long()
        high = torch.minimum(low + 1, last.clamp(min=0))
        below, above = ordered.gather(-1, low), ordered.gather(-1, high)
        found.append((below + (above - below) * (position - low)).squeeze(-1))
    return found


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return (20 * torch.log10(signal / noise)).clamp(-DB_LIMIT, DB_LIMIT)
