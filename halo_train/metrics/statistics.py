"""Statistics of tensors and of products, on the device and without waiting for it, in two stages.

Samples of several layers are stacked and reduced to a few sums by row (:class:`Reduced`). At the end of the step the sums of
all layers are finished together, kind by kind: kernel launches, not arithmetic, would otherwise be most of the cost.

Rounding is compared in rows: tokens of X, E, Y and dX, output channels of W, columns of dW. A row without signal (padding)
or whose exact values are not finite has no signal-to-noise ratio and does not count; a row that only its rounding made
non-finite counts as -300 dB, one that is exact as 300 dB.

Below, L is the number of layers in a stack and T that of tensors or products of each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DB_LIMIT = 300.0

HISTOGRAM_BINS = 32
"""Binary orders of magnitude below the largest value; the last bin holds all that is smaller still."""

HISTOGRAM_ROWS = 32
"""Of the sampled rows."""

_QUANTILES = (0.5, 0.1, 0.0)

Names = tuple[tuple[str, ...], ...]
"""For each of T tensors or products the keys that its statistics go by: several where they are the same by definition."""


class Reduced(NamedTuple):
    """Sums from which the statistics of T tensors or products of each of L layers are finished."""

    kind: str
    """Key of :data:`STATS_OF`."""
    names: Names
    sums: tuple[Tensor, ...]
    """Each [L, T] or [L, T, ...]."""
    length: int = 0
    """Elements that a sum is over, where the kind needs it."""


def scale_reduced(names: Names, amax: Tensor, squares: Tensor, count: int) -> Reduced:
    """For amax, rms and crest.

    Args:
        amax: [L, T], the largest magnitudes. squares: [L, T, Q], sums of squares whose total is that of the tensor.
        count: its elements.
    """
    return Reduced("scale", names, (amax, squares.sum(-1) / count))


def outliers_reduced(
    names: Names, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor]
) -> list[Reduced]:
    """For nonfinite and both outlier statistics.

    Args:
        by_row: sums of squares and sums of the rows, [L, T, R] each. by_column: of the columns, [L, T, Q] each.
    """
    return [
        Reduced("rows", names, by_row, by_column[0].shape[-1]),
        Reduced("columns", names, by_column, by_row[0].shape[-1]),
    ]


def sample_outliers(names: Names, of_rows: Tensor, of_columns: Tensor) -> list[Reduced]:
    """:func:`outliers_reduced` from ops.rounding_moments of sampled rows, [L, T, 7, R] and [L, T, 2, Q]."""
    return outliers_reduced(
        names, (of_rows[:, :, 1], of_rows[:, :, 0]), (of_columns[:, :, 1], of_columns[:, :, 0])
    )


def exponents_reduced(names: Names, counts: Tensor) -> Reduced:
    """For the histograms of exponents; counts: [L, T, EXPONENTS] of ops.rounding_moments."""
    return Reduced("exponents", names, (counts,))


def rounding_reduced(names: Names, of_rows: Tensor, columns: int) -> Reduced:
    """For the statistics of rounding.

    Args:
        of_rows: [L, T, 7, R], ops.rounding_moments of sampled rows. columns: elements of a row.
    """
    return Reduced("rounding", names, (of_rows,), of_rows.shape[-1] * columns)


def product_reduced(names: Names, exact: Tensor, approximate: Tensor) -> Reduced:
    """For the statistics of T roundings of a product.

    Args:
        exact: [L, 1, R, Q] float64. approximate: [L, T, R, Q] float64.
    """
    noise = torch.linalg.vector_norm(approximate - exact, dim=-1)
    signal = torch.linalg.vector_norm(exact, dim=-1).expand_as(noise)
    overlap = (approximate * exact).sum((-2, -1))
    own = torch.linalg.vector_norm(approximate, dim=(-2, -1))
    return Reduced("product", names, (signal, noise, overlap, own))


Finished = Iterator[tuple[str, str, str, list[float]]]
"""Layer, key, kind, and the statistics in the order of :data:`STATS_OF` (32 shares for exponents)."""


def finish(found: Sequence[tuple[Sequence[str], Reduced]]) -> Finished:
    """The statistics of every tensor and product of every layer.

    What is of one kind and shape is finished in one batch, and each device brings everything over in one transfer.

    Args:
        found: names of the layers in a stack, and what they were reduced to.
    """
    groups: dict[tuple[object, ...], list[tuple[Sequence[str], Reduced]]] = {}
    for layers, reduced in found:
        shapes = ((s.shape[2:], s.dtype, s.device) for s in reduced.sums)
        groups.setdefault((reduced.kind, reduced.length, *shapes), []).append((layers, reduced))
    finished: dict[torch.device, list[tuple[list[tuple[Sequence[str], Reduced]], Tensor]]] = {}
    for members in groups.values():
        kind, _, _, length = members[0][1]
        sums = zip(*(reduced.sums for _, reduced in members), strict=True)
        stats = _FINISH[kind](length, *(torch.cat([part.flatten(0, 1) for part in parts]) for parts in sums))
        finished.setdefault(stats.device, []).append((members, stats))
    for batches in finished.values():
        numbers = torch.cat([stats.flatten() for _, stats in batches]).tolist()
        start = 0
        for members, stats in batches:
            width = stats.shape[1]
            for layers, reduced in members:
                for layer in layers:
                    for names in reduced.names:
                        for name in names:
                            yield layer, name, reduced.kind, numbers[start : start + width]
                        start += width


# Below, B is the number of tensors that are finished together.


def _finish_scale(_: int, amax: Tensor, mean_square: Tensor) -> Tensor:
    rms = mean_square.sqrt()
    return torch.stack([amax, rms, amax / rms], -1)


def _finish_rows(columns: int, square: Tensor, total: Tensor) -> Tensor:
    variance = _variance(square, total, columns)
    return torch.stack([_outliers(variance, columns), (~torch.isfinite(variance)).double().mean(-1)], -1)


def _finish_columns(rows: int, square: Tensor, total: Tensor) -> Tensor:
    return _outliers(_variance(square, total, rows), rows)[:, None]


def _finish_rounding(count: int, of_rows: Tensor) -> Tensor:
    _, square, fourth, error, nonzero, kept, saturated = of_rows.unbind(1)
    kurtosis = count * fourth.sum(-1) / square.sum(-1).square()
    # Zeros (padding) have nothing to lose: shares are of the nonzero elements.
    some = nonzero.sum(-1).clamp(min=1)
    underflow, saturation = (nonzero - kept).sum(-1) / some, saturated.sum(-1) / some
    return torch.stack([kurtosis, underflow, saturation, *_sqnr(square.sqrt(), error.sqrt())], -1)


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
"""Names of what each kind is finished to; docs/metrics.md defines them."""

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
    if samples < 2 or variance.shape[-1] < 2:
        return variance.new_full(variance.shape[:-1], math.nan)
    return variance.std(-1) / variance.mean(-1) / math.sqrt(2 / (samples - 1))


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
