"""What one sampled step says, and how large its sample is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from statistics import median

from .statistics import OUTLIER_STATS, PRODUCT_STATS, ROUNDING_STATS, WHOLE_STATS

GROUPS = {
    "whole": (*WHOLE_STATS, "nonfinite", *OUTLIER_STATS),
    "tensor": (*WHOLE_STATS, "nonfinite", *OUTLIER_STATS, *ROUNDING_STATS),
    "operand": (*WHOLE_STATS, *OUTLIER_STATS, *ROUNDING_STATS),
    "product": PRODUCT_STATS,
}
"""Names of the values that are measured together; docs/metrics.md defines each."""

HISTOGRAM = "exponents"
"""Name of the group that holds :func:`halo_train.metrics.statistics.exponent_histogram`."""

STATS = tuple(dict.fromkeys(name for names in GROUPS.values() for name in names))

HIGH_IS_BAD = ("crest", "kurtosis", "nonfinite", "underflow", "saturation", *OUTLIER_STATS)
LOW_IS_BAD = ("sqnr_db", "median_db", "p10_db", "min_db", "cosine")

WORST, MEDIAN = "worst_layer", "median_layer"
"""Names under which the aggregates over layers stand beside the layers."""

Values = dict[str, dict[str, dict[str, float]]]
"""{layer: {tensor or product: {stat: value}}}"""


@dataclasses.dataclass(frozen=True)
class SampleSize:
    """Tokens, output and input features that are drawn at random for every layer and step, without replacement."""

    tokens: int
    out_features: int
    in_features: int


@dataclasses.dataclass(frozen=True)
class QuantSample:
    """Everything that :class:`QuantMetrics` measured in one step."""

    step: int
    size: SampleSize
    recipes: dict[str, str]
    """Recipe of each layer."""
    values: Values
    """``values["model.layers.0.mlp.up_proj"]["dgrad@int8"]["median_db"]``"""
    histograms: dict[str, dict[str, list[float]]]
    """``histograms[layer][tensor]``: shares by binary order below the largest value, HISTOGRAM_BINS of them."""

    def aggregates(self) -> Values:
        """Worst and median layer of every stat for which one of the two directions is bad."""
        found: Values = {WORST: {}, MEDIAN: {}}
        for part in dict.fromkeys(part for parts in self.values.values() for part in parts):
            for stat in dict.fromkeys(s for parts in self.values.values() for s in parts.get(part, ())):
                measured = self._over_layers(part, stat)
                if stat in HIGH_IS_BAD or stat in LOW_IS_BAD or stat == "bias":
                    found[WORST].setdefault(part, {})[stat] = _worst(stat, measured)
                    found[MEDIAN].setdefault(part, {})[stat] = median(measured) if measured else math.nan
        return found

    def flat(self) -> dict[str, float]:
        """``{"quant/<layer>/<tensor or product>/<stat>": value}`` of all layers and of the aggregates."""
        size = {f"quant/sample/{k}": float(v) for k, v in dataclasses.asdict(self.size).items()}
        return size | {
            f"quant/{layer}/{part}/{stat}": value
            for layer, parts in (self.aggregates() | self.values).items()
            for part, stats in parts.items()
            for stat, value in stats.items()
        }

    def worst_layers(self, part: str, stat: str) -> list[str]:
        """Layers that have the stat, the worst first; those where it is undefined come before all others."""
        has = {name: parts[part][stat] for name, parts in self.values.items() if stat in parts.get(part, {})}
        sign = 1 if stat in LOW_IS_BAD else -1
        return sorted(has, key=lambda name: -math.inf if math.isnan(has[name]) else sign * has[name])

    def _over_layers(self, part: str, stat: str) -> list[float]:
        values = (parts[part][stat] for parts in self.values.values() if stat in parts.get(part, {}))
        return [value for value in values if not math.isnan(value)]


def _worst(stat: str, values: Iterable[float]) -> float:
    if stat in LOW_IS_BAD:
        return min(values, default=math.nan)
    return max(values, key=abs if stat == "bias" else None, default=math.nan)
