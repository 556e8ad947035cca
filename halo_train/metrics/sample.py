"""What one sampled step says, and how large its sample is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from statistics import median

from .products import PRODUCTS
from .statistics import STATS_OF

STATS = tuple(dict.fromkeys(name for names in STATS_OF.values() for name in names))
"""Every stat of a tensor or product; docs/metrics.md defines each."""

TENSORS = ("x", "w", "e", "x_operand", "w_operand", "e_dgrad_operand", "e_wgrad_operand")
"""Keys of the tensors of a layer; docs/metrics.md defines each."""

HIGH_IS_BAD = ("crest", "kurtosis", "nonfinite", "underflow", "saturation", "row_outliers", "column_outliers")
LOW_IS_BAD = ("sqnr_db", "median_db", "p10_db", "min_db", "cosine")
_JUDGED = (*HIGH_IS_BAD, *LOW_IS_BAD, "bias")

CHARTED = ("sqnr_db", "median_db", "p10_db", "underflow", "crest", "nonfinite")
"""Stats of single layers that trackers draw."""

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

    @functools.cached_property
    def aggregates(self) -> Values:
        """Worst and median layer of every stat for which one of the two directions is bad."""
        found: Values = {WORST: {}, MEDIAN: {}}
        for part in self.parts():
            layers = [parts[part] for parts in self.values.values() if part in parts]
            for stat in _JUDGED:
                values = [stats[stat] for stats in layers if stat in stats]
                if values:
                    known = [value for value in values if not math.isnan(value)]
                    found[WORST].setdefault(part, {})[stat] = _worst(stat, known)
                    found[MEDIAN].setdefault(part, {})[stat] = median(known) if known else math.nan
        return found

    def flat(self) -> dict[str, float]:
        """``{"quant/<layer>/<tensor or product>/<stat>": value}`` of all layers and of the aggregates."""
        values = {f"quant/sample/{k}": float(v) for k, v in dataclasses.asdict(self.size).items()}
        for layer, parts in (self.aggregates | self.values).items():
            for part, stats in parts.items():
                prefix = f"quant/{layer}/{part}/"
                values.update({prefix + stat: value for stat, value in stats.items()})
        return values

    def charts(self) -> dict[str, float]:
        """What trackers draw: aggregates as in :meth:`flat`; of single layers :data:`CHARTED` only.

        A tracker slows down with tens of thousands of curves; all values are in the JSONL file. Keys of layers are
        ``quant_<tensor or product>/<stat>/<layer>``, which trackers show as one section for each tensor and product.
        """
        curves = {
            f"quant/{name}/{part}/{stat}": value
            for name, parts in self.aggregates.items()
            for part, stats in parts.items()
            for stat, value in stats.items()
        }
        for layer, parts in self.values.items():
            for part, stats in parts.items():
                curves.update({f"quant_{part}/{s}/{layer}": v for s, v in stats.items() if s in CHARTED})
        return curves

    def parts(self) -> list[str]:
        """Tensors and products that any layer has."""
        return list(dict.fromkeys(part for parts in self.values.values() for part in parts))

    def labels(self) -> list[str]:
        """What-if recipes of the products; ``""`` stands for the recipe that ran."""
        return list(dict.fromkeys(part.partition("@")[2] for part in self.parts() if is_product(part)))

    def compared(self) -> list[str]:
        """:meth:`labels` without a recipe that every layer runs anyway."""
        running = set(self.recipes.values())
        return [label for label in self.labels() if running != {label}]

    def product_table(self) -> tuple[list[str], list[list[str | float]]]:
        """Column names and rows: layer, recipe, norm-wise SQNR of every product as run and under each what-if recipe."""
        products = [part for part in self.parts() if is_product(part)]
        rows: list[list[str | float]] = []
        for layer, parts in self.values.items():
            figures = [parts.get(product, {}).get("sqnr_db", math.nan) for product in products]
            rows.append([layer, self.recipes[layer], *figures])
        return ["layer", "recipe", *products], rows

    def score(self, layer: str, label: str = "") -> float:
        """:func:`lower_db` of the worst of the three products.

        -inf where one is undefined (NaN in the data); NaN where the layer was not measured so: high precision as run.

        Args:
            label: a what-if recipe; ``""`` is the recipe that ran.
        """
        suffix = f"@{label}" if label else ""
        parts = self.values[layer]
        measured = [parts.get(product + suffix, {}) for product in PRODUCTS]
        figures = [lower_db(stats) for stats in measured if stats.keys() & _DECISIVE]
        if not figures:
            return math.nan
        return -math.inf if any(map(math.isnan, figures)) else min(figures)

    def worst_first(self) -> list[str]:
        """Layers by :meth:`score` as run, the worst first, those in high precision last."""
        scores = {layer: self.score(layer) for layer in self.values}
        return sorted(scores, key=lambda layer: math.inf if math.isnan(scores[layer]) else scores[layer])


_DECISIVE = {"sqnr_db", "median_db"}


def lower_db(stats: Mapping[str, float]) -> float:
    """What a product is judged by: of its norm-wise SQNR, which large tokens decide, and its median the lower; NaN where one is."""
    figures = [stats[name] for name in _DECISIVE if name in stats]
    return math.nan if not figures or any(map(math.isnan, figures)) else min(figures)


def is_product(part: str) -> bool:
    """Whether a part is a product, as run or under a what-if recipe, and not a tensor."""
    return part.partition("@")[0] in PRODUCTS


def _worst(stat: str, values: Sequence[float]) -> float:
    if stat in LOW_IS_BAD:
        return min(values, default=math.nan)
    return max(values, key=abs if stat == "bias" else None, default=math.nan)
