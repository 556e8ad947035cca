"""What a run shows at its end: the loss plot and the table that sets the 8-bit run beside its bf16 twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from rich.table import Table

from halo_train import ProductError
from halo_train.metrics import PRODUCTS

from .logging import read_metrics

matplotlib.use("Agg")  # before pyplot is imported; needs no display
from matplotlib import pyplot as plt

TAIL = 10
"""Steps over which the final training loss is averaged: that of one batch is mostly noise."""

MAX_LAYERS = 28
"""Of larger models the table shows this many layers, those with the worst fprop."""

_WARM_UP = 3
"""First steps, which are slower, do not count for tokens/s."""


@dataclass(frozen=True)
class Result:
    """What a finished run came to. Losses are nats per trained token."""

    recipe: str
    layers_converted: int
    layers_left_alone: int
    """Modules with a matrix weight that the recipe does not touch, such as embeddings."""
    valid_before: float
    valid_after: float
    train_loss: float
    """Mean over the last :data:`TAIL` steps."""
    tokens_per_second: float
    """Median over the steps, padding not counted."""
    peak_memory_gib: float | None
    """On the GPU; None on the CPU."""
    errors: dict[str, dict[str, ProductError]]
    """Of the three products by layer, see :func:`halo_train.measure_products`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite or undefined SQNR is null."""
        values = asdict(self)
        values["errors"] = {
            layer: {
                p: {k: v if math.isfinite(v) else None for k, v in asdict(e).items()}
                for p, e in products.items()
            }
            for layer, products in self.errors.items()
        }
        return values


def summarise(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """``valid_before``, ``valid_after``, ``train_loss`` and ``tokens_per_second`` from the lines of metrics.jsonl."""
    valid = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    return {
        "valid_before": valid[0],
        "valid_after": valid[-1],
        "train_loss": fmean(line["loss"] for line in steps[-TAIL:]),
        "tokens_per_second": median(
            line["tokens_per_second"] for line in steps[min(_WARM_UP, len(steps) - 1) :]
        ),
    }


def comparison_table(run: Result, twin: Result | None, emulated: bool) -> Table:
    """One table: losses, speed and, layer by layer, the SQNR of the three products.

    Args:
        run: the run; twin: the same in bf16, or None.
        emulated: the 8-bit arithmetic was emulated on a CPU, so that its speed means nothing.
    """
    results = [run] if twin is None else [run, twin]
    title = (
        f"{run.recipe} beside the same run in bf16: same data, order, seed and first weights"
        if twin
        else run.recipe
    )
    caption = "SQNR: signal over rounding noise of each product against float64; higher is better. For wgrad read columns for tokens."
    if emulated:
        caption += (
            "\n* On a CPU the 8-bit arithmetic is emulated exactly: losses and SQNR are real, its tokens/s say nothing "
            "about speed."
        )
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    table.add_column("", overflow="fold")
    for result in results:
        table.add_column(result.recipe, justify="right", no_wrap=True)
    if twin:
        table.add_column("gap", justify="right", no_wrap=True)

    def losses(label: str, values: list[float]) -> None:
        gap = [f"{values[0] - values[1]:+.4f}"] if twin else []
        table.add_row(label, *(f"{value:.4f}" for value in values), *gap)

    table.add_row("[bold]loss, nats a token[/bold]")
    losses("validation, before", [result.valid_before for result in results])
    losses("validation, after", [result.valid_after for result in results])
    losses(f"last {TAIL} steps", [result.train_loss for result in results])
    table.add_section()
    speeds = [result.tokens_per_second for result in results]
    marks = ["*" if emulated and result.recipe != "bf16" else "" for result in results]
    ratio = [f"x {speeds[0] / speeds[1]:.2f}"] if twin and not emulated else []
    table.add_row("tokens/s", *(f"{s:,.0f}{mark}" for s, mark in zip(speeds, marks, strict=True)), *ratio)
    if run.peak_memory_gib is not None:
        table.add_row("peak GPU memory, GiB", *(f"{result.peak_memory_gib:.2f}" for result in results))

    table.add_row("layers converted", *(str(result.layers_converted) for result in results))
    table.add_section()
    table.add_row("[bold]SQNR in dB[/bold]", *["[bold]" + " / ".join(PRODUCTS) + "[/bold]"] * len(results))
    table.add_row("median layer", *(_over_layers(result, "sqnr_db") for result in results))
    table.add_row("  its median token", *(_over_layers(result, "median_db") for result in results))
    table.add_row("  its worst 10%", *(_over_layers(result, "p10_db") for result in results))
    shown = _layers_to_show(run.errors)
    prefix = _common_prefix(shown)
    table.add_section()
    table.add_row(f"[bold]{prefix or 'layer'}[/bold]", *[""] * len(results))
    for layer in shown:
        table.add_row(layer.removeprefix(prefix), *(_cell(result.errors[layer]) for result in results))
    return table


def plot_losses(path: Path, title: str, runs: Mapping[str, Path]) -> None:
    """A PNG with training and validation losses of the runs and, for two runs, what the first loses against the second.

    Args:
        path: of the picture.
        title: above it.
        runs: ``{recipe: metrics.jsonl}``, the 8-bit run first.
    """
    curves = {name: read_metrics(file) for name, file in runs.items()}
    figure, axes = plt.subplots(
        len(curves), 1, figsize=(8, 3.4 + 1.6 * len(curves)), sharex=True, squeeze=False,
        height_ratios=[3, 1][: len(curves)], layout="constrained",
    )  # fmt: skip
    top = axes[0, 0]
    # The runs nearly coincide: the second is drawn wide and below, the first thin and on top.
    styles = [("tab:blue", 1.6, 3, "o"), ("tab:orange", 4.0, 2, "s")]
    for (name, lines), (colour, width, order, marker) in zip(curves.items(), styles, strict=False):
        steps, losses = _points(lines, "loss")
        top.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8, zorder=1)
        smooth = _smooth(losses)
        top.plot(
            steps, smooth, color=colour, linewidth=width, zorder=order, label=f"{name}: training, smoothed"
        )
        top.plot(
            *_points(lines, "valid_loss"), color=colour, marker=marker, markersize=5 + width, linestyle="none",
            markeredgecolor="white", zorder=order + 2, label=f"{name}: validation",
        )  # fmt: skip
    top.set_title(title, loc="left")
    top.set_ylabel("loss (nats per trained token)")
    top.legend(frameon=False)
    top.grid(alpha=0.3)
    if len(curves) > 1:
        (name, first), (other, second) = curves.items()
        bottom = axes[1, 0]
        for key, style in (
            ("loss", {"color": "tab:blue"}),
            ("valid_loss", {"color": "black", "marker": "o"}),
        ):
            steps, here = _points(first, key)
            there = dict(zip(*_points(second, key), strict=True))
            shared = [(s, h - there[s]) for s, h in zip(steps, here, strict=True) if s in there]
            label = "training" if key == "loss" else "validation"
            bottom.plot(*zip(*shared, strict=True), linewidth=1.2, markersize=4, label=label, **style)
        bottom.axhline(0, color="tab:orange", linewidth=1)
        bottom.set_ylabel(f"{name} minus {other}")
        bottom.legend(frameon=False, ncols=2)
        bottom.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.align_ylabels()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    chosen = [line for line in lines if key in line]
    return [line["step"] for line in chosen], [line[key] for line in chosen]


def _smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the pull of its start."""
    smooth, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + 1 - weight
        smooth.append(total / mass)
    return smooth


def _layers_to_show(errors: Mapping[str, Mapping[str, ProductError]]) -> list[str]:
    worst = sorted(errors, key=lambda layer: errors[layer]["fprop"].sqnr_db)[:MAX_LAYERS]
    return [layer for layer in errors if layer in worst]


def _common_prefix(layers: Sequence[str]) -> str:
    """The modules that all layers are in, e.g. ``model.layers.``; without them a row fits a narrow terminal."""
    levels = zip(*(layer.split(".")[:-1] for layer in layers), strict=False)
    return "".join(level[0] + "." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _over_layers(result: Result, field: str) -> str:
    layers = result.errors.values()
    return " / ".join(f"{median(getattr(errors[p], field) for errors in layers):.1f}" for p in PRODUCTS)


def _cell(errors: Mapping[str, ProductError]) -> str:
    return " / ".join(f"{errors[product].sqnr_db:.1f}" for product in PRODUCTS)
