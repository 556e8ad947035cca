"""The schemes of train_parity.py, and what their runs show as a table and a picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def gaps(results: list[dict[str, Any]], scheme: str, outlier: int) -> list[float]:
    """Final validation loss over that of bf16 with the same seed."""
    losses = {(r["scheme"], r["seed"]): r["loss"] for r in results if r["outlier"] == outlier}
    pairs = [(loss, losses.get(("bf16", seed))) for (name, seed), loss in losses.items() if name == scheme]
    return [loss - base for loss, base in pairs if base is not None]


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
    """Gap to bf16 over the steps, one panel for each c, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(outliers), figsize=(4.6 * len(outliers), 4), squeeze=False)
    for axis, c in zip(axes[0], outliers, strict=True):
        curves = {r["scheme"]: r["curve"] for r in results if r["outlier"] == c and r["seed"] == 0}
        for scheme, curve in curves.items():
            if scheme != "bf16" and "bf16" in curves:
                points = [(s, v - b) for (s, v), (_, b) in zip(curve, curves["bf16"], strict=True)]
                bold = 2.2 if scheme in MAIN else 1.0
                axis.plot(*zip(*points, strict=True), label=scheme, linewidth=bold)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title(f"outliers x {c}", loc="left", fontsize=10)
        axis.set_xlabel("fine-tuning step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("validation loss over bf16")
    axes[0, -1].legend(fontsize=6, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
