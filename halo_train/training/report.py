"""What a run shows at its end: the loss plot, and the table with losses, speed and the SQNR of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from halo_train import ProductError
from halo_train.metrics import PRODUCTS

from .logging import read_metrics

TAIL = 10
"""Steps over which the final training loss is averaged: that of one batch is mostly noise."""

MAX_LAYERS = 28
"""Of larger models the table shows this many layers, those with the worst fprop."""

_WARM_UP = 3
"""First steps, which are slower, do not count for tokens/s and the wait for data."""


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
    data_wait: float
    """Share of the steps' time that waited for a batch."""
    share_8bit: float
    """Of the operations in matrix products, output layer and attention included; see FlopCounter."""
    mfu: float | None
    """Median over the steps: operations a second over the GPU's dense bfloat16 peak; None where that is not known."""
    peak_memory_gib: float | None
    """On the GPU; None on the CPU."""
    exact_match: float | None
    """Share of right answers at the last step; None without the section ``eval``."""
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


def summarise(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What a :class:`Result` has of the lines of metrics.jsonl."""
    valid = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    settled = steps[min(_WARM_UP, len(steps) - 1) :]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in settled]
    waited = [line["data_wait"] * spent for line, spent in zip(settled, seconds, strict=True)]
    _, matches = points(metrics, "exact_match")
    return {
        "valid_before": valid[0],
        "valid_after": valid[-1],
        "exact_match": matches[-1] if matches else None,
        "train_loss": fmean(line["loss"] for line in steps[-TAIL:]),
        "tokens_per_second": median(line["tokens_per_second"] for line in settled),
        "data_wait": sum(waited) / sum(seconds),
        "share_8bit": fmean(line["share_8bit"] for line in settled),
        "mfu": median(line["mfu"] for line in settled) if "mfu" in settled[0] else None,
    }


def run_table(result: Result, emulated: bool) -> Table:
    """Losses, speed and, layer by layer, the SQNR of the three products.

    Args:
        emulated: the 8-bit arithmetic was emulated on a CPU, so that its speed means nothing.
    """
    caption = "SQNR: signal over rounding noise of each product against float64; higher is better. For wgrad read columns for tokens."
    if emulated:
        caption += (
            "\n* On a CPU the 8-bit arithmetic is emulated exactly: losses and SQNR are real, its tokens/s say nothing "
            "about speed."
        )
    table = Table(title=result.recipe, caption=caption, caption_justify="left", title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column(result.recipe, justify="right", no_wrap=True)

    table.add_row("[bold]loss, nats a token[/bold]")
    table.add_row("validation, before", f"{result.valid_before:.4f}")
    table.add_row("validation, after", f"{result.valid_after:.4f}")
    table.add_row(f"last {TAIL} steps", f"{result.train_loss:.4f}")
    if result.exact_match is not None:
        table.add_row("exact match", f"{100 * result.exact_match:.2f}%")
    table.add_section()
    table.add_row("tokens/s", f"{result.tokens_per_second:,.0f}{'*' if emulated else ''}")
    if result.peak_memory_gib is not None:
        table.add_row("peak GPU memory, GiB", f"{result.peak_memory_gib:.2f}")

    table.add_row("time waiting for data", f"{result.data_wait:.1%}")
    table.add_row("layers converted", str(result.layers_converted))
    table.add_row("matrix operations in 8 bits", f"{result.share_8bit:.1%}")
    if result.mfu is not None:
        table.add_row("model FLOPs utilisation", f"{result.mfu:.1%}")
    table.add_section()
    table.add_row("[bold]SQNR in dB[/bold]", "[bold]" + " / ".join(PRODUCTS) + "[/bold]")
    table.add_row("median layer", _over_layers(result, "sqnr_db"))
    table.add_row("  its median token", _over_layers(result, "median_db"))
    table.add_row("  its worst 10%", _over_layers(result, "p10_db"))
    shown = _layers_to_show(result.errors)
    prefix = _common_prefix(shown)
    table.add_section()
    table.add_row(f"[bold]{prefix or 'layer'}[/bold]")
    for layer in shown:
        table.add_row(layer.removeprefix(prefix), _cell(result.errors[layer]))
    return table


def plot_losses(path: Path, title: str, metrics: Path) -> None:
    """A PNG with the training and validation losses of a run.

    Args:
        path: of the picture.
        title: above it.
        metrics: its ``metrics.jsonl``.
    """
    lines = read_metrics(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, losses = points(lines, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.6, label="training, smoothed")
    axes.plot(
        *points(lines, "valid_loss"), color="tab:orange", marker="o", markersize=7, linestyle="none",
        markeredgecolor="white", label="validation", zorder=3,
    )  # fmt: skip
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def points(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines of a metrics.jsonl that have ``key``."""
    chosen = [line for line in lines if key in line]
    return [line["step"] for line in chosen], [line[key] for line in chosen]


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the pull of its start."""
    averages, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + 1 - weight
        averages.append(total / mass)
    return averages


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
