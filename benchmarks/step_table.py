"""Tables and a picture of what bench_step.py measured, in one run or in several.

    python benchmarks/step_table.py out1/*step*.json out2/*step*.json --out benchmarks/results

Ratios are of one run, with its own bf16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, save_json

CATEGORIES = {
    "GEMM": "#4477aa",
    "attention": "#66ccee",
    "rotate and round": "#ee6677",
    "optimiser": "#ccbb44",
    "other": "#bbbbbb",
}
"""Of GPU time, with their colours."""


def table(rows: list[dict[str, Any]], where: dict[str, Any], size: dict[str, int]) -> str:
    """Markdown of every row."""
    lines = [
        f"Training step: {', '.join(f'{name} {value}' for name, value in size.items())}. {where['gpu']}, driver {where['driver']}, "
        f"torch {where['torch']}, {where['date']}, commit {where['commit']}.",
        "",
        "| | mode | checkpointing | loss | ms | times bf16 | tokens/s | peak GiB | activations GiB | "
        + " | ".join(f"{name} ms" for name in CATEGORIES)
        + " |",
        "|---" * (9 + len(CATEGORIES)) + "|",
    ]
    for row in rows:
        parts = " | ".join(f"{row['gpu_ms'][name]:.0f}" for name in CATEGORIES)
        lines.append(
            f"| {row['name']} | {_mode(row)} | {row['checkpointing']} | {row['loss']} | {row['ms']:.1f} | {row['speedup']:.2f} | "
            f"{row['tokens_per_second']:.0f} | {row['peak_gib']:.1f} | {row['activations_gib']:.1f} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """One bar a row: GPU time by category, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row['name']}, {_mode(row)}{_extras(row)}" for row in rows]
    figure, (times, memory) = plt.subplots(
        1, 2, figsize=(12, 0.9 + 0.26 * len(rows)), sharey=True, width_ratios=[2, 1], layout="constrained"
    )
    places = range(len(rows))
    left = [0.0] * len(rows)
    for name, colour in CATEGORIES.items():
        widths = [row["gpu_ms"][name] for row in rows]
        times.barh(places, widths, left=left, color=colour, label=name, height=0.75)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        times.text(left[place], place, f" {row['ms']:.0f} ms, {row['speedup']:.2f}x", va="center", fontsize=7)
        memory.text(row["peak_gib"], place, f" {row['peak_gib']:.1f}", va="center", fontsize=7)
    memory.barh(places, [row["peak_gib"] for row in rows], color="#aa3377", height=0.75)
    times.set_yticks(list(places), labels, fontsize=7)
    times.invert_yaxis()
    times.set_xlim(0, 1.18 * max(left))
    times.set_xlabel("GPU time of a step, ms; times bf16 of the same kind")
    memory.set_xlabel("peak memory, GiB")
    times.legend(fontsize=7, ncols=len(CATEGORIES), loc="lower center", bbox_to_anchor=(0.5, 1))
    for axis in (times, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Training step, {where['gpu']}, torch {where['torch']}, {where['date']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(record: dict[str, Any], out: Path, name: str = "step") -> Path:
    """The record as a dated JSON file, with its table and its picture beside it."""
    path = save_json(name, record, out)
    path.with_suffix(".md").write_text(table(record["rows"], record["environment"], record["size"]))
    draw(record["rows"], record["environment"], path.with_suffix(".png"))
    return path


def _mode(row: dict[str, Any]) -> str:
    return "compiled" if row["compiled"] else "eager"


def _extras(row: dict[str, Any]) -> str:
    extras = [f"{row['checkpointing']} recomputation"] if row["checkpointing"] != "none" else []
    extras += [f"{row['loss']} loss"] if row["loss"] != "transformers" else []
    return "".join(f", {extra}" for extra in extras)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of bench_step.py, of one size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="step", help="part of the names of the results")
    args = parser.parse_args()
    records = [json.loads(file.read_text()) for file in args.files]
    if any(record["size"] != records[0]["size"] for record in records):
        parser.error("the files must be of one size; got " + str([record["size"] for record in records]))
    record = {**records[0], "rows": [row for each in records for row in each["rows"]]}
    print(save(record, args.out, args.name))


if __name__ == "__main__":
    main()
