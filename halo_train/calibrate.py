"""calibrate(): chooses a recipe for every layer by the error that it measures and the time that it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from torch import nn

from .config import RECIPES, HaloConfig
from .convert import convert_to_halo_training, revert
from .cost import H200, predicted_speedup
from .metrics import PRODUCTS, QuantMetrics, QuantSample
from .recipe_file import save_recipe

CANDIDATES: dict[str, HaloConfig] = {
    "fp8_plain": RECIPES["fp8_plain"],
    "fp8": RECIPES["fp8"],
    "int8_plain": dataclasses.replace(RECIPES["int8"].with_folded_dgrad, rotate_k=False, equalize=False),
    "int8": RECIPES["int8"],
}
"""Each format with and without equalisation and rotation."""

Prefer = Literal["memory", "time"]

TARGET_DB = 22.0
"""Between what trained like bf16 (24 dB in the worst product) and what did not (19 dB): docs/numerics.md, sections 3, 6."""

_RATES, _TOKENS = H200._replace(host_bf16=0.0, host_float8=0.0, host_int8=0.0), 16384
"""Of the GPU alone, which layers of a transformer keep busy with so many tokens."""


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """What was measured of a layer, what was chosen for it and why."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    recipe: str
    """Key of :data:`CANDIDATES`, or ``bf16``."""
    scores: dict[str, float]
    """Of every candidate: the worst of the three products, of its norm-wise and median SQNR the lower, dB."""
    products: dict[str, dict[str, float]]
    """``products["int8"]["wgrad"]``: norm-wise SQNR, dB."""
    time: dict[str, float]
    """Of every candidate and bf16: forward and backward over that of bf16, see :func:`relative_time`."""
    reason: str


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Result of :func:`calibrate`; print it, convert with :attr:`recipe`, keep it with :meth:`save`."""

    layers: list[LayerChoice]
    batches: int
    target_db: float

    @property
    def recipe(self) -> dict[str, HaloConfig]:
        """For ``convert_to_halo_training(model, recipe=...)``."""
        known = CANDIDATES | {"bf16": RECIPES["bf16"]}
        return {layer.name: known[layer.recipe] for layer in self.layers}

    def save(self, path: str | Path) -> None:
        """Writes the recipe file that ``load_recipe`` and ``quant.recipe`` read, the evidence beside it."""
        evidence = {
            "batches": self.batches,
            "target_db": self.target_db,
            "layers": {layer.name: _rounded(dataclasses.asdict(layer)) for layer in self.layers},
        }
        save_recipe(path, self.recipe, evidence)

    def __str__(self) -> str:
        counts = {name: sum(layer.recipe == name for layer in self.layers) for name in (*CANDIDATES, "bf16")}
        chosen = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        lines = [
            f"{len(self.layers)} layers, {self.batches} batches, at least {self.target_db:g} dB in the worst product: {chosen}",
            "worst product of each candidate in dB; time beside bf16 as modelled for an H200",
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines.append(f"  {'':<{width}}  " + "".join(f"{name:>12}" for name in CANDIDATES) + "   chosen")
        for layer in self.layers:
            scores = "".join(f"{layer.scores[name]:>12.1f}" for name in CANDIDATES)
            lines.append(f"  {layer.name:<{width}}  {scores}   {layer.reason}")
        slower = sum(layer.time[layer.recipe] > 1 for layer in self.layers)
        if slower:
            lines.append(
                f"{slower} of them, too small to gain time, save memory alone; prefer='time' (--prefer time) leaves those in bf16"
            )
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    step_fn: Callable[[nn.Module, Any], Any] | None = None,
    *,
    target_db: float = TARGET_DB,
    prefer: Prefer = "memory",
) -> Calibration:
    """Measures every layer in every candidate format, with and without rotation, and chooses a recipe for each.

    The model runs in high precision. A layer gets the candidate with the least modelled time among those whose worst
    product reaches the target, and bf16 where none does. Figures are medians over the batches.

    Args:
        model: not converted; it is left as it was, its gradients cleared.
        batches: inputs, one forward and backward each.
        step_fn: (model, batch) -> runs forward and backward; None is ``model(**batch).loss.backward()`` as for the models
            of transformers with labels in the batch.
        target_db: lowest SQNR that a product may have, norm-wise and in the median.
        prefer: ``"memory"`` takes bf16 only where no 8-bit candidate reaches the target: in 8 bits a layer keeps one byte an
            element of X for backward instead of two. ``"time"`` also where none of them is faster, as for small layers.

    Raises:
        ValueError: no layer that can be converted, no batches, step_fn ran no backward, or an unknown ``prefer``.
    """
    if prefer not in get_args(Prefer):
        raise ValueError(f"calibrate: prefer must be one of {', '.join(get_args(Prefer))}; got {prefer!r}")
    step_fn = step_fn or _loss_backward
    convert_to_halo_training(model, recipe="bf16")
    samples: list[QuantSample] = []
    try:
        with QuantMetrics(
            model, every=1, what_if=list(CANDIDATES.values()), sinks=[samples.append]
        ) as metrics:
            shapes = {name: (m.out_features, m.in_features) for name, m in metrics.layers.items()}
            for batch in batches:
                step_fn(model, batch)
                metrics.step()
                model.zero_grad(set_to_none=True)
    finally:
        revert(model)
    if not samples:
        raise ValueError(
            "calibrate: nothing was measured; batches must not be empty and step_fn must call loss.backward()"
        )
    layers = [
        _choose(name, shapes[name], samples, target_db, prefer)
        for name in shapes
        if all(name in sample.values for sample in samples)
    ]
    return Calibration(layers, len(samples), target_db)


def relative_time(config: HaloConfig, shape: tuple[int, int]) -> float:
    """Forward and backward of a layer beside bf16, by the model of :mod:`halo_train.cost` with the rates of an H200.

    Args:
        shape: (out_features, in_features).
    """
    return 1 / predicted_speedup(_TOKENS, shape, config, _RATES)


def _choose(
    name: str, shape: tuple[int, int], samples: list[QuantSample], target_db: float, prefer: Prefer
) -> LayerChoice:
    labels = {candidate: config.name for candidate, config in CANDIDATES.items()}
    scores = {c: median(sample.score(name, label) for sample in samples) for c, label in labels.items()}
    products = {
        c: {p: median(s.values[name][f"{p}@{label}"]["sqnr_db"] for s in samples) for p in PRODUCTS}
        for c, label in labels.items()
    }
    time = {c: relative_time(config, shape) for c, config in (CANDIDATES | {"bf16": RECIPES["bf16"]}).items()}
    good = [c for c in CANDIDATES if scores[c] >= target_db]
    if not good:
        best = max(scores, key=lambda c: scores[c])
        worst = min(products[best], key=lambda p: products[best][p])
        reason = (
            f"bf16: no 8-bit recipe reaches {target_db:g} dB; {best} comes to {scores[best]:.1f} ({worst})"
        )
        return LayerChoice(name, shape, "bf16", scores, products, time, reason)
    chosen = min(good, key=lambda c: time[c])
    if prefer == "time" and time[chosen] >= 1:
        reason = f"bf16: no 8-bit recipe is faster; {chosen} takes {time[chosen]:.2f} of its time"
        return LayerChoice(name, shape, "bf16", scores, products, time, reason)
    cheaper = [c for c in CANDIDATES if time[c] < time[chosen]]
    why = f"time {time[chosen]:.2f} of bf16"
    if cheaper:
        why += "; " + ", ".join(f"{c} only {scores[c]:.1f} dB" for c in cheaper)
    return LayerChoice(name, shape, chosen, scores, products, time, f"{chosen}: {why}")


def _loss_backward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    model(**batch).loss.backward()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    return value
