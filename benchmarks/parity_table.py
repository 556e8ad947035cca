"""The schemes of train_parity.py, and what their runs show as a table and a picture.

python benchmarks/parity_table.py A.json B.json     # records of the same weights, from several machines, as one
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, save_json

from halo_train import RECIPES, HaloConfig
from halo_train.config import Format, Scaling

_FP8, _INT8 = RECIPES["fp8"], RECIPES["int8"]
SCHEMES: dict[str, HaloConfig] = {
    "bf16": RECIPES["bf16"],
    "fp8": _FP8,
    "int8": _INT8,
    "fp8, folded dgrad": _FP8.with_folded_dgrad,
    "int8, folded dgrad": _INT8.with_folded_dgrad,
    "e4m3 folded (fp8_plain)": RECIPES["fp8_plain"],
    "e4m3 folded, rotated": replace(_FP8.with_folded_dgrad, equalize=False),
    "int8 folded": replace(_INT8.with_folded_dgrad, equalize=False, rotate_k=False),
    "int8 folded, rotated": replace(_INT8.with_folded_dgrad, equalize=False),
    "e4m3 tensorwise, e5m2 gradients": HaloConfig(
        grad_format=Format.E5M2,
        scaling=Scaling.TENSORWISE,
        rotate_k=False,
        requantize_w_dgrad=False,
        equalize=False,
    ),
    "HALO-0 e4m3": RECIPES["halo0_fp8"],
    "HALO-1 e4m3": RECIPES["halo1_fp8"],
    "HALO-0 int8": RECIPES["halo0_int8"],
    "HALO-2 int8": RECIPES["halo2_int8"],
}
MAIN = list(SCHEMES)[:3]
"""Those that run with every seed; the others with the first."""


def by_scheme(run: dict[str, Any]) -> tuple[int, int, int]:
    """Sorts runs as the table has them."""
    return list(SCHEMES).index(run["scheme"]), run["outlier"], run["seed"]


def joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of all records as one record.

    Raises:
        ValueError: the runs started from different weights.
    """
    weights = {record["weights_sha256_16"] for record in records}
    if len(weights) > 1:
        raise ValueError(
            f"gaps count only between runs from the same weights; got records of {len(weights)}: {weights}"
        )
    runs = {by_scheme(run): run for record in records for run in record["runs"]}
    commands = dict.fromkeys(record["command"] for record in records)
    return {**records[0], "command": "; ".join(commands), "runs": [runs[key] for key in sorted(runs)]}


def write_report(record: dict[str, Any], path: Path) -> str:
    """Table and picture beside the record at ``path``; returns the table."""
    outliers = sorted({run["outlier"] for run in record["runs"]})
    text = table(record["runs"], outliers) + "\n" + run_table(record["runs"], outliers)
    path.with_suffix(".md").write_text(text)
    if outliers:
        draw(record["runs"], outliers, path.with_suffix(".png"))
    return text


def gaps(results: list[dict[str, Any]], scheme: str, outlier: int) -> list[float]:
    """Final validation loss over that of bf16 with the same seed."""
    losses = {(r["scheme"], r["seed"]): r["loss"] for r in results if r["outlier"] == outlier}
    pairs = [(loss, losses.get(("bf16", seed))) for (name, seed), loss in losses.items() if name == scheme]
    return [loss - base for loss, base in pairs if base is not None]


def gaps_over_the_run(results: list[dict[str, Any]], scheme: str, outlier: int) -> list[float]:
    """As :func:`gaps`, the mean over all validation losses of a run: fewer digits of it are chance."""
    curves = {(r["scheme"], r["seed"]): r["curve"] for r in results if r["outlier"] == outlier}
    pairs = [(curve, curves.get(("bf16", seed))) for (name, seed), curve in curves.items() if name == scheme]
    return [
        statistics.fmean(loss - bf16 for (_, loss), (_, bf16) in zip(curve, base, strict=True))
        for curve, base in pairs
        if base is not None
    ]


def run_table(results: list[dict[str, Any]], outliers: list[int]) -> str:
    """Markdown: :func:`gaps_over_the_run` of the schemes with several seeds, mean and standard error of the mean."""
    lines = [
        "| mean over the run | " + " | ".join(f"c={c}" for c in outliers) + " |",
        "|---" * (len(outliers) + 1) + "|",
    ]
    for scheme in MAIN[1:]:
        found = [gaps_over_the_run(results, scheme, c) for c in outliers]
        cells = [
            f"{statistics.fmean(each):+.5f} ± {statistics.stdev(each) / math.sqrt(len(each)):.5f}, {len(each)} seeds"
            if len(each) > 1
            else ""
            for each in found
        ]
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(results: list[dict[str, Any]], outliers: list[int]) -> str:
    """Markdown: mean gap by scheme and c, with the range over seeds where there are several."""
    lines = [
        "| scheme | " + " | ".join(f"c={c}" for c in outliers) + " |",
        "|---" * (len(outliers) + 1) + "|",
    ]
    for scheme in SCHEMES:
        cells = []
        for c in outliers:
            if scheme == "bf16":
                losses = [r["loss"] for r in results if r["scheme"] == "bf16" and r["outlier"] == c]
                if not losses:
                    cells.append("")
                    continue
                spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
                cells.append(
                    f"loss {statistics.fmean(losses):.4f}, standard deviation over seeds {spread:.4f}"
                )
                continue
            found = gaps(results, scheme, c)
            several = f" ({min(found):+.4f} .. {max(found):+.4f})" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):+.4f}{several}" if found else "")
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], outliers: list[int], path: Path) -> None:
    """Gap to bf16 over the steps, one panel for each c, first seed; schemes in int8 are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(outliers), figsize=(4.4 * len(outliers) + 2, 4), squeeze=False, layout="constrained"
    )
    families = [
        [name for name in SCHEMES if name != "bf16" and ("int8" in name) is is_int8]
        for is_int8 in (False, True)
    ]
    styles = {
        name: {"color": f"C{i}", "linestyle": line}
        for family, line in zip(families, ("-", "--"), strict=True)
        for i, name in enumerate(family)
    }
    for axis, c in zip(axes[0], outliers, strict=True):
        curves = {r["scheme"]: r["curve"] for r in results if r["outlier"] == c and r["seed"] == 0}
        for scheme, curve in curves.items():
            if scheme != "bf16" and "bf16" in curves:
                points = [(s, v - b) for (s, v), (_, b) in zip(curve, curves["bf16"], strict=True)]
                bold = 2.2 if scheme in MAIN else 1.0
                axis.plot(*zip(*points, strict=True), label=scheme, linewidth=bold, **styles[scheme])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title(f"outliers x {c}", loc="left", fontsize=10)
        axis.set_xlabel("fine-tuning step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("validation loss over bf16")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    record = joined([json.loads(path.read_text()) for path in args.records])
    path = save_json("train-parity", record, args.out)
    print(write_report(record, path) + f"\n{path}")


if __name__ == "__main__":
    main()
