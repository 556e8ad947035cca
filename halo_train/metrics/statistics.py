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

DB_LIMIT = 300.0

HISTOGRAM_BINS = 32
"""Binary orders of magnitude below the largest value; the last bin holds all that is smaller still."""

_EXPONENTS = (-149, 128)
"""Of the smallest and the largest float32: range of the histogram before it is shifted to the largest value."""

_QUANTILES = (0.5, 0.1, 0.0)


class Reduction(NamedTuple):
    """Sums of one tensor or product from which its statistics are finished."""

    kind: str
    """Key of :data:`STATS_OF`."""
    sums: tuple[Tensor, ...]
    """Vectors over rows and scalars."""
    length: int = 0
    """Elements that a sum is over, where the kind needs it."""


class WholeTensor(NamedTuple):
    """Reductions of a matrix [R, Q], each one pass over its own dtype; all but the first of the matrix times ``unit``."""

    row_amax: Tensor
    """In the dtype of the matrix."""
    unit: Tensor
    """Power of two that brings amax into [0.5, 1), so that squares stay inside float32; float64."""
    row_norm: Tensor
    row_sum: Tensor
    col_norm: Tensor
    col_sum: Tensor

    @staticmethod
    def of(x: Tensor) -> WholeTensor:
        """x: [R, Q], any floating-point dtype, both dimensions at least 1."""
        row_amax = torch.linalg.vector_norm(x, math.inf, dim=1)
        amax = row_amax.max().double()
        exponent = torch.where(torch.isfinite(amax), torch.frexp(amax).exponent, 0)
        unit = torch.exp2(-exponent.double())
        # On a GPU bfloat16 is summed in float32 without a copy in it; in float64 there would be one of four times the size.
        wide = torch.promote_types(x.dtype, torch.float32)
        z = (x if x.dtype == torch.bfloat16 else x.to(wide)) * unit.to(wide)
        return WholeTensor(
            row_amax,
            unit,
            torch.linalg.vector_norm(z, dim=1, dtype=wide),
            z.sum(1, dtype=wide),
            torch.linalg.vector_norm(z, dim=0, dtype=wide),
            z.sum(0, dtype=wide),
        )

    def amax(self) -> Tensor:
        return self.row_amax.max()

    def rms(self, row_scale: Tensor | None = None, col_scale: Tensor | None = None) -> Tensor:
        """Of x, of diag(row_scale) x or of x diag(col_scale); float64."""
        norms, scale = (self.row_norm, row_scale) if col_scale is None else (self.col_norm, col_scale)
        norms = norms.double() if scale is None else norms.double() * scale
        count = len(self.row_norm) * len(self.col_norm)
        return torch.linalg.vector_norm(norms) / self.unit / math.sqrt(count)

    def reductions(self) -> list[Reduction]:
        """For amax, rms, crest, nonfinite and both outlier statistics."""
        rows, columns = len(self.row_norm), len(self.col_norm)
        return [
            Reduction("scale", (self.amax().double(), self.rms())),
            Reduction("rows", (self.row_norm, self.row_sum), columns),
            Reduction("columns", (self.col_norm, self.col_sum), rows),
        ]


def outlier_reductions(rows: Tensor) -> list[Reduction]:
    """For nonfinite and both outlier statistics of sampled rows [R, Q], float64."""
    norm, (count, length) = torch.linalg.vector_norm, rows.shape
    return [
        Reduction("rows", (norm(rows, dim=1), rows.sum(1)), length),
        Reduction("columns", (norm(rows, dim=0), rows.sum(0)), count),
    ]


def exponent_reduction(rows: Tensor) -> Reduction:
    """For the histogram of exponents of sampled rows [R, Q], float64."""
    low, high = _EXPONENTS
    return Reduction("exponents", (torch.histc(rows.abs().log2(), high - low, low, high),))


def rounding_reductions(before: Tensor, after: Tensor, saturated: Tensor) -> list[Reduction]:
    """One for each of T tensors.

    Args:
        before, after: [T, R, Q] float64, values of sampled rows before and after rounding.
        saturated: [T, R, Q] bool, at the largest value of the format.
    """
    count = before[0].numel()
    sums = (
        torch.linalg.vector_norm(before, dim=-1),
        torch.linalg.vector_norm(after - before, dim=-1),
        torch.linalg.vector_norm(before, 4, dim=(-2, -1)),
        (before != 0).sum((-2, -1), dtype=before.dtype),
        (after != 0).sum((-2, -1), dtype=before.dtype),
        saturated.sum((-2, -1), dtype=before.dtype),
    )
    return [Reduction("rounding", part, count) for part in zip(*(s.unbind() for s in sums), strict=True)]


def product_reductions(exact: Tensor, approximate: Tensor) -> list[Reduction]:
    """One for each of T roundings.

    Args:
        exact: [R, Q] float64. approximate: [T, R, Q] float64.
    """
    signal = torch.linalg.vector_norm(exact, dim=-1)
    sums = (
        torch.linalg.vector_norm(approximate - exact, dim=-1),
        (approximate * exact).sum((-2, -1)),
        torch.linalg.vector_norm(approximate, dim=(-2, -1)),
    )
    return [Reduction("product", (signal, *part)) for part in zip(*(s.unbind() for s in sums), strict=True)]


def finish(reductions: Sequence[Reduction]) -> list[Tensor]:
    """The statistics of each reduction, float64 vectors in the order of :data:`STATS_OF` (32 shares for exponents)."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (kind, sums, length) in enumerate(reductions):
        key = (kind, length, sums[0].device, *(s.shape for s in sums))
        groups.setdefault(key, []).append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        kind, sums, length = reductions[members[0]]
        stacked = [torch.stack([reductions[i].sums[field] for i in members]) for field in range(len(sums))]
        found.update(zip(members, _FINISH[kind](length, *stacked).unbind(), strict=True))
    return [found[i] for i in range(len(reductions))]


# Below, B is the number of tensors that are finished together.


def _finish_scale(_: int, amax: Tensor, rms: Tensor) -> Tensor:
    return torch.stack([amax, rms, amax / rms], -1)


def _finish_rows(columns: int, norm: Tensor, total: Tensor) -> Tensor:
    variance = _variance(norm, total, columns)
    return torch.stack([_outliers(variance, columns), (~torch.isfinite(variance)).double().mean(-1)], -1)


def _finish_columns(rows: int, norm: Tensor, total: Tensor) -> Tensor:
    return _outliers(_variance(norm, total, rows), rows)[:, None]


def _finish_rounding(
    count: int,
    signal: Tensor,
    noise: Tensor,
    fourth: Tensor,
    nonzero: Tensor,
    kept: Tensor,
    saturated: Tensor,
) -> Tensor:
    # Fourth root and square roots are what the norms return; their ratio stays in range.
    kurtosis = count * (fourth / torch.linalg.vector_norm(signal, dim=-1)) ** 4
    some = nonzero.clamp(min=1)
    # Zeros (padding) have nothing to lose: shares are of the nonzero elements.
    underflow, saturation = (nonzero - kept) / some, saturated / some
    return torch.stack([kurtosis, underflow, saturation, *_sqnr(signal, noise)], -1)


def _finish_product(_: int, signal: Tensor, noise: Tensor, overlap: Tensor, own: Tensor) -> Tensor:
    exact = torch.linalg.vector_norm(signal, dim=-1)
    return torch.stack([*_sqnr(signal, noise), overlap / exact / own, overlap / exact / exact - 1], -1)


def _finish_exponents(_: int, counts: Tensor) -> Tensor:
    bins = torch.arange(counts.shape[-1], device=counts.device)
    top = torch.where(counts > 0, bins, 0).amax(-1, keepdim=True)
    order = top - bins[: HISTOGRAM_BINS - 1]
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


def _variance(norm: Tensor, total: Tensor, count: int) -> Tensor:
    return ((norm.double().square() - total.double().square() / count) / max(count - 1, 1)).clamp(min=0)


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
