"""What a comparison shows: a row for each run and, with several conditions, the mean gap of each value; the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from halo_train.metrics import PRODUCTS

from .compare import PLAN, Comparison
from .logging import read_metrics, write_atomically
from .report import points, smooth

NOT_RUN = "-"

_COLOURS = (
    "tab:orange",
    "tab:blue",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
)


@dataclass(frozen=True)
class Line:
    """Figures of one run. Losses are nats per trained token; a gap is the difference from the run it is compared with."""

    name: str
    value: str
    condition: str
    valid_loss: float
    gap: float | None
    """None where the run it is compared with has not finished."""
    train_loss: float
    tokens_per_second: float
    speed: float | None
    """tokens_per_second over that of the run it is compared with."""
    share_8bit: float
    """Of the operations in matrix products: that 8 bits were really on."""
    peak_memory_gib: float | None
    sqnr_db: dict[str, float]
    """Median layer, for each of the three products; empty when no layer was measured."""
    exact_match: float | None
    emulated: bool


def read_lines(comparison: Comparison) -> list[Line]:
    """Of the runs that have finished, in order."""
    lines = []
    for member in comparison.members:
        summary, reference = member.summary, comparison.reference(member).summary
        if summary is None:
            continue
        lines.append(
            Line(
                name=member.name,
                value=member.value,
                condition=member.condition,
                valid_loss=summary["valid_after"],
                gap=None if reference is None else summary["valid_after"] - reference["valid_after"],
                train_loss=summary["train_loss"],
                tokens_per_second=summary["tokens_per_second"],
                speed=None
                if reference is None
                else summary["tokens_per_second"] / reference["tokens_per_second"],
                share_8bit=summary["share_8bit"],
                peak_memory_gib=summary["peak_memory_gib"],
                sqnr_db=_median_layer(summary["errors"]),
                exact_match=summary["exact_match"],
                emulated=summary["emulated_on_cpu"],
            )
        )
    return lines


def write_comparison(comparison: Comparison, failed: Mapping[str, int]) -> tuple[Table, list[Path]]:
    """Writes ``compare.json``, ``compare.md`` and ``compare.png`` to the folder of the comparison.

    Args:
        failed: exit codes of runs that failed, by name.

    Returns:
        The table for the terminal, and the files.
    """
    lines = read_lines(comparison)
    head, rows = _cells(comparison, lines, failed)
    notes = _notes(comparison, lines)
    files = [comparison.folder / name for name in (PLAN, "compare.md", "compare.png")]
    record = {
        "compared": comparison.compared,
        "runs": [member.name for member in comparison.members],
        "failed": dict(failed),
        "results": [asdict(line) for line in lines],
    }
    write_atomically(files[0], json.dumps(record, indent=2) + "\n")
    write_atomically(files[1], _markdown(head, rows) + "\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    if lines:
        _plot(files[2], comparison, lines)
    table = Table(
        title=f"{comparison.folder.name}: by {comparison.compared}",
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
    )
    table.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table, files if lines else files[:2]


def _cells(
    comparison: Comparison, lines: Sequence[Line], failed: Mapping[str, int]
) -> tuple[list[str], list[list[str]]]:
    memory = any(line.peak_memory_gib is not None for line in lines)
    match = any(line.exact_match is not None for line in lines)
    head = ["run", "valid. loss", "gap", "training loss", "tokens/s", "speed", "8-bit"]
    head += ["peak GiB"] * memory + ["exact match"] * match + ["SQNR " + "/".join(PRODUCTS)]
    by_name = {line.name: line for line in lines}
    rows = []
    for member in comparison.members:
        line = by_name.get(member.name)
        if line is None:
            state = f"failed ({failed[member.name]})" if member.name in failed else "not run"
            rows.append([member.name, state, *[NOT_RUN] * (len(head) - 2)])
            continue
        mark = "*" if line.emulated else ""
        row = [
            line.name,
            f"{line.valid_loss:.4f}",
            NOT_RUN if line.gap is None else f"{line.gap:+.4f}",
            f"{line.train_loss:.4f}",
            f"{line.tokens_per_second:,.0f}{mark}",
            NOT_RUN if line.speed is None or line.emulated else f"{line.speed:.2f}",
            f"{100 * line.share_8bit:.0f}%",
        ]
        if memory:
            row.append(NOT_RUN if line.peak_memory_gib is None else f"{line.peak_memory_gib:.2f}")
        if match:
            row.append(NOT_RUN if line.exact_match is None else f"{100 * line.exact_match:.2f}%")
        row.append("/".join(f"{line.sqnr_db[p]:.0f}" for p in PRODUCTS) if line.sqnr_db else NOT_RUN)
        rows.append(row)
    return head, rows


def _notes(comparison: Comparison, lines: Sequence[Line]) -> list[str]:
    first = comparison.members[0].value
    notes = [f"gap: validation loss minus that of {first} on the same data, order, seed and first weights"]
    for value, gaps in mean_gaps(lines).items():
        if value != first:
            notes.append(
                f"mean gap of {value} over {len(gaps)} conditions: {fmean(gaps):+.4f}, standard deviation {stdev(gaps):.4f}"
            )
    notes.append("8-bit: share of the operations in matrix products that ran in 8 bits")
    notes.append("SQNR: signal over rounding noise of each product in dB, median layer; higher is better")
    if any(line.emulated for line in lines):
        notes.append(
            "* emulated exactly on the CPU: losses and SQNR are real, tokens/s say nothing about speed"
        )
    return notes


def mean_gaps(lines: Sequence[Line]) -> dict[str, list[float]]:
    """Gaps of each value over the conditions, of values with at least two."""
    gaps: dict[str, list[float]] = {}
    for line in lines:
        if line.gap is not None:
            gaps.setdefault(line.value, []).append(line.gap)
    return {value: found for value, found in gaps.items() if len(found) > 1}


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _median_layer(errors: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for product in PRODUCTS:
        values = [layer[product]["sqnr_db"] for layer in errors.values()]
        finite = [value for value in values if value is not None]
        if finite:
            found[product] = median(finite)
    return found if len(found) == len(PRODUCTS) else {}


def _plot(path: Path, comparison: Comparison, lines: Sequence[Line]) -> None:
    """Losses above, below what each run loses against the one it is compared with; colours by value, a line for each run."""
    finished = {line.name for line in lines}
    curves = {
        member.name: read_metrics(member.folder / "metrics.jsonl")
        for member in comparison.members
        if member.name in finished
    }
    values = list(dict.fromkeys(member.value for member in comparison.members))
    colour = {value: _COLOURS[i % len(_COLOURS)] for i, value in enumerate(values)}
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    named: set[str] = set()
    for member in comparison.members:
        if member.name not in curves:
            continue
        style = {"color": colour[member.value], "label": None if member.value in named else member.value}
        named.add(member.value)
        _draw_losses(top, curves[member.name], style)
        reference = comparison.reference(member)
        if reference.name in curves and reference is not member:
            _draw_gap(bottom, curves[member.name], curves[reference.name], colour[member.value])
    bottom.axhline(0, color=colour[values[0]], linewidth=1)
    top.set_title(f"{comparison.folder.name}: by {comparison.compared}", loc="left")
    top.set_ylabel("loss (nats per trained token)")
    top.legend(frameon=False, title="line: training, smoothed; dots: validation")
    bottom.set_ylabel(f"minus {values[0]}")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.align_ylabels()
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, lines: Sequence[Mapping[str, float]], style: Mapping[str, Any]) -> None:
    steps, losses = points(lines, "loss")
    axes.plot(steps, smooth(losses), linewidth=1.4, **style)
    axes.plot(*points(lines, "valid_loss"), marker="o", markersize=5, linestyle="none", color=style["color"])


def _draw_gap(
    axes: Axes, here: Sequence[Mapping[str, float]], there: Sequence[Mapping[str, float]], colour: str
) -> None:
    """Training losses as a smoothed line, validation losses as dots; at the steps that both have."""
    for key in ("loss", "valid_loss"):
        other = dict(zip(*points(there, key), strict=True))
        shared = [(s, v - other[s]) for s, v in zip(*points(here, key), strict=True) if s in other]
        if not shared:
            continue
        steps, gaps = zip(*shared, strict=True)
        if key == "loss":
            axes.plot(steps, smooth(gaps), linewidth=1.2, color=colour)
        else:
            axes.plot(steps, gaps, marker="o", markersize=4, linestyle="none", color=colour)
