"""The report as one HTML page: figures as JSON inside, drawn by the page's own script, nothing loaded from elsewhere."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from halo_train.calibrate import TARGET_DB
from halo_train.metrics import PRODUCTS, QuantSample
from halo_train.metrics.sample import MEDIAN, WORST, is_product, lower_db

from .advice import Advice, advise

PRODUCT_STATS = ("sqnr_db", "median_db", "p10_db", "min_db", "cosine", "bias")
TENSOR_STATS = ("crest", "kurtosis", "underflow", "saturation", "sqnr_db", "median_db", "amax", "rms")

BEFORE_AFTER = {
    "X": ("x", "x_operand"),
    "W": ("w", "w_operand"),
    "E for dgrad": ("e", "e_dgrad_operand"),
    "E for wgrad": ("e", "e_wgrad_operand"),
}
"""Tensors as they are and as the recipe rounds them."""

_TEMPLATE = Path(__file__).with_name("page.html")


def render_page(title: str, samples: Sequence[QuantSample]) -> str:
    """The page of the samples of a run, at least one."""
    # "<" would end the script element early.
    data = json.dumps(page_data(samples), separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", data)


def page_data(samples: Sequence[QuantSample]) -> dict[str, Any]:
    """What the page draws; NaN and inf are null."""
    last = samples[-1]
    labels = last.compared()
    layers, advice = last.worst_first(), advise(samples)
    return _finite(
        {
            "steps": [sample.step for sample in samples],
            "size": dataclasses.asdict(last.size),
            "target": TARGET_DB,
            "products": list(PRODUCTS),
            "labels": labels,
            "stats": ["lower_db", *PRODUCT_STATS],
            "recipes": last.recipes,
            "order": list(last.values),
            "worst": layers,
            "scores": {layer: {label: last.score(layer, label) for label in labels} for layer in layers},
            "values": {
                layer: {
                    part: [lower_db(stats), *(stats.get(name) for name in PRODUCT_STATS)]
                    for part, stats in parts.items()
                    if is_product(part)
                }
                for layer, parts in last.values.items()
            },
            "tensorStats": list(TENSOR_STATS),
            "beforeAfter": BEFORE_AFTER,
            "tensors": {
                layer: {
                    part: [parts[part].get(name) for name in TENSOR_STATS]
                    for pair in BEFORE_AFTER.values()
                    for part in pair
                    if part in parts
                }
                for layer, parts in last.values.items()
            },
            "exponents": last.histograms,
            "drift": drift_of(samples),
            "advice": [dataclasses.asdict(advice) for advice in advice],
            "mapping": _mapping(last, advice),
        }
    )


def _mapping(sample: QuantSample, advice: Sequence[Advice]) -> dict[str, str]:
    """The recipes of all layers with the advice followed, the most common one as ``*``; empty without advice."""
    changes = {a.layer: a.recipe for a in advice if a.recipe is not None}
    wanted = sample.recipes | changes
    common = Counter(wanted.values()).most_common(1)[0][0]
    return {name: r for name, r in wanted.items() if r != common} | {"*": common} if changes else {}


def drift_of(samples: Sequence[QuantSample]) -> dict[str, dict[str, list[float]]]:
    """:func:`lower_db` as run over the steps: {worst_layer, median_layer or layer: {product: one value a sample}}."""
    names = [WORST, MEDIAN, *samples[-1].values]
    curves: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PRODUCTS} for name in names}
    for sample in samples:
        for product in PRODUCTS:
            of_layer = {name: lower_db(parts.get(product, {})) for name, parts in sample.values.items()}
            known = [value for value in of_layer.values() if not math.isnan(value)]
            of_all = {WORST: min(known, default=math.nan), MEDIAN: median(known) if known else math.nan}
            for name in names:
                curves[name][product].append((of_all | of_layer).get(name, math.nan))
    return curves


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
