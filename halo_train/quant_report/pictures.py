"""The report as PNG files, for places that show no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from halo_train.calibrate import TARGET_DB
from halo_train.metrics import PRODUCTS, QuantSample
from halo_train.metrics.sample import MEDIAN, WORST, lower_db

from .page import BEFORE_AFTER, drift_of

matplotlib.use("Agg")  # before pyplot is imported; needs no display
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

MAX_LAYERS = 64
"""Rows of a picture: of larger models the worst layers."""

_COLOURS = ("tab:blue", "tab:orange", "tab:green")


def draw_pictures(folder: Path, samples: Sequence[QuantSample]) -> list[Path]:
    """``quant_heatmap.png``, ``quant_drift.png`` and ``quant_rotation.png`` in an existing folder."""
    files = [folder / f"quant_{name}.png" for name in ("heatmap", "drift", "rotation")]
    for file, draw in zip(files, (_heatmap, _drift, _rotation), strict=True):
        figure = draw(samples)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return files


def _heatmap(samples: Sequence[QuantSample]) -> plt.Figure:
    last = samples[-1]
    layers, labels = _shown(last), last.compared()
    figure, axes = plt.subplots(
        1, len(labels), figsize=(3.2 + 2.3 * len(labels), 1.6 + 0.24 * len(layers)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    norm = TwoSlopeNorm(TARGET_DB, 0, 45)
    for axis, label in zip(axes[0], labels, strict=True):
        suffix = f"@{label}" if label else ""
        of_products = [[last.values[n].get(p + suffix, {}) for p in PRODUCTS] for n in layers]
        grid = [[lower_db(stats) for stats in row] for row in of_products]
        image = axis.imshow(grid, aspect="auto", cmap="RdBu", norm=norm)
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                dark = not math.isnan(value) and abs(norm(value) - 0.5) > 0.33
                axis.text(
                    column, row, _cell(value, of_products[row][column]), ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
        axis.set_title(f"if {label}" if label else "as run", fontsize=9)
        axis.set_xticks(range(len(PRODUCTS)), PRODUCTS)
    axes[0, 0].set_yticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=axes[0, -1], label="dB")
    figure.suptitle(
        f"Signal over rounding noise at step {last.step}, dB, the lower of norm-wise and median; white is {TARGET_DB:g}",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    return figure


def _drift(samples: Sequence[QuantSample]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    curves = drift_of(samples)
    steps = [sample.step for sample in samples]
    for product, colour in zip(PRODUCTS, _COLOURS, strict=True):
        for which, style in ((MEDIAN, "-"), (WORST, "--")):
            name = which.replace("_", " ")
            axis.plot(
                steps, curves[which][product], style, color=colour, marker=".", label=f"{product}, {name}"
            )
    axis.axhline(TARGET_DB, color="tab:red", linewidth=0.8, linestyle=":")
    axis.set_xlabel("step")
    axis.set_ylabel("SQNR, dB (the lower of norm-wise and median)")
    axis.legend(frameon=False, ncols=3, fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _rotation(samples: Sequence[QuantSample]) -> plt.Figure:
    last = samples[-1]
    layers = _shown(last)
    figure, axes = plt.subplots(
        1, len(BEFORE_AFTER), figsize=(13, 1.6 + 0.2 * len(layers)), sharey=True, layout="constrained"
    )
    for axis, (title, (before, after)) in zip(axes, BEFORE_AFTER.items(), strict=True):
        for row, name in enumerate(layers):
            values = [last.values[name].get(part, {}).get("crest", math.nan) for part in (before, after)]
            axis.plot(values, [row, row], color="0.6", linewidth=1, zorder=1)
            axis.plot(values[0], row, "o", mfc="white", mec="black", markersize=5)
            axis.plot(values[1], row, "o", color="tab:blue", markersize=5)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].invert_yaxis()
    figure.suptitle("Crest factor (amax / RMS): as it is (white), as it is rounded (blue)", x=0.01, ha="left")
    return figure


def _cell(value: float, stats: Mapping[str, float]) -> str:
    if math.isnan(value):
        return "NaN" if stats else "-"  # "-": not measured
    return f"{value:.0f}"


def _shown(sample: QuantSample) -> list[str]:
    worst = set(sample.worst_first()[:MAX_LAYERS])
    return [layer for layer in sample.values if layer in worst]
