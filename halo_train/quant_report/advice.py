"""What a run's samples say to do about a layer, with the figures that say so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import median

from halo_train.calibrate import TARGET_DB, relative_time
from halo_train.config import RECIPES, Format, HaloConfig, Scaling
from halo_train.metrics import PRODUCTS, QuantSample
from halo_train.metrics.sample import lower_db

RECENT = 3
"""Samples at the end of a run over which the median is taken: one draw of rows is noisy."""

GAIN_DB = 3.0
"""Another recipe has to be better by this much before it is recommended."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """One recommendation."""

    layer: str
    action: str
    """What to do, in one line; also the pattern and recipe for ``convert_to_halo_training(recipe={...})`` where it is one."""
    evidence: str
    score: float
    """Of the layer as run, see :meth:`QuantSample.score`."""
    recipe: str | None
    """Recipe to use instead."""


def recent_score(samples: Sequence[QuantSample], layer: str, label: str = "") -> float:
    """Median of :meth:`QuantSample.score` over the last samples that have the layer; NaN where none has."""
    scores = [sample.score(layer, label) for sample in samples if layer in sample.values][-RECENT:]
    known = [score for score in scores if not math.isnan(score)]
    return median(known) if known else math.nan


def advise(samples: Sequence[QuantSample]) -> list[Advice]:
    """Recommendations for the layers whose worst product stays under TARGET_DB, the worst first."""
    last = samples[-1]
    found = [_advise_layer(samples, layer) for layer in last.values]
    return sorted((advice for advice in found if advice), key=lambda advice: advice.score)


def _advise_layer(samples: Sequence[QuantSample], layer: str) -> Advice | None:
    last = samples[-1]
    parts = last.values[layer]
    broken = [name for name in ("x", "w", "e") if parts.get(name, {}).get("nonfinite", 0) > 0]
    if broken:
        shares = ", ".join(f"{name.upper()} in {parts[name]['nonfinite']:.1%} of its rows" for name in broken)
        action = "find where NaN or inf comes from; no recipe repairs it"
        return Advice(layer, action, f"NaN or inf: {shares}", -math.inf, None)
    own = recent_score(samples, layer)
    if math.isnan(own) or own >= TARGET_DB:
        return None
    running = RECIPES.get(last.recipes[layer])
    instead = {label: _recipe_of(label, running, last.labels()) for label in last.labels() if label}
    others = {label: recent_score(samples, layer, label) for label, recipe in instead.items() if recipe}
    good = [name for name, score in others.items() if score >= max(TARGET_DB, own + GAIN_DB)]
    # As calibrate() does: of those that are good enough the cheapest, and of equals the better.
    label = min(good, key=lambda name: (_time(instead[name]), -others[name]), default=None)
    recipe: str | None
    if label is None:
        label = max(others, key=lambda name: others[name], default=None)
        recipe, action, note = "bf16", "keep this layer in bf16", ""
        if label is not None:
            action += f"; no measured recipe reaches {TARGET_DB:g} dB"
    else:
        recipe = instead[label]
        action = _change(running, RECIPES.get(recipe or ""), recipe or "")
        note = "" if recipe == label else f"; {recipe} was not measured: it is {label} with one scale a row"
    return Advice(layer, action, _evidence(samples, layer, label) + note, own, recipe)


def _recipe_of(label: str, running: HaloConfig | None, measured: Sequence[str]) -> str | None:
    """What to run if a what-if recipe is good: a scheme with one scale a tensor is there for comparison, as it cannot be fused and
    a token that grows flushes all others; without rotation it stands for ``fp8_plain``."""
    config = RECIPES.get(label)
    if (
        config is None
        or config.scaling is Scaling.ROWWISE
        or (running and running.scaling is Scaling.TENSORWISE)
    ):
        return label
    stands_for_plain = config.format is Format.E4M3 and not config.rotate_k and "fp8_plain" not in measured
    return "fp8_plain" if stands_for_plain else None


def _time(label: str | None) -> float:
    """Modelled, of a layer of common size; a recipe without a name comes last."""
    return relative_time(RECIPES[label], (4096, 4096)) if label in RECIPES else math.inf


def _change(now: HaloConfig | None, then: HaloConfig | None, label: str) -> str:
    if now is None or then is None:
        return f"use {label} here"
    if now.format is then.format and now.scaling is then.scaling and now.rotate_k and not then.rotate_k:
        return f"turn the rotation off here: {label}"
    if now.format is then.format and now.scaling is then.scaling and then.rotate_k and not now.rotate_k:
        return f"rotate here: {label}"
    return f"use {label} here"


def _evidence(samples: Sequence[QuantSample], layer: str, label: str | None) -> str:
    parts = samples[-1].values[layer]

    product = min((p for p in PRODUCTS if p in parts), key=lambda p: lower_db(parts[p]))
    stat = min(("sqnr_db", "median_db"), key=lambda name: parts[product].get(name, math.inf))
    kind = {"sqnr_db": "norm-wise", "median_db": "in the median"}[stat]
    text = f"{product} {parts[product][stat]:.1f} dB {kind}"
    if label is not None:
        text += f", {parts[f'{product}@{label}'][stat]:.1f} with {label}"
    tensors = {
        "fprop": ("x_operand", "w_operand"),
        "dgrad": ("e_dgrad_operand",),
        "wgrad": ("e_wgrad_operand",),
    }
    for operand in tensors[product]:
        stats = parts.get(operand, {})
        if stats.get("underflow", 0) > 0.05:
            text += f"; {stats['underflow']:.0%} of {operand} flushed to zero"
        if stats.get("crest", 0) > 30:
            text += f"; crest factor of {operand} {stats['crest']:.0f}"
    return text
