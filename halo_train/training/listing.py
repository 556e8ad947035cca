"""What ``halo-train ls`` shows: run files and precision recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from halo_train import RECIPES, HaloConfig


def run_files_table(files: Sequence[Path]) -> Table:
    """Files and the first sentence of the comment that each starts with."""
    table = Table("run file", "what it does", title="Run files", title_justify="left")
    for path in files:
        table.add_row(str(path), _first_sentence(path))
    return table


def recipes_table() -> Table:
    """Every named recipe with its fields in words."""
    head = ("quant.recipe", "format", "scales", "rotated", "equalised")
    table = Table(*head, title="Precision recipes", title_justify="left")
    for name, config in RECIPES.items():
        table.add_row(name, *_fields(config))
    return table


def _first_sentence(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return " ".join(lines).partition(". ")[0]


def _fields(config: HaloConfig) -> tuple[str, str, str, str]:
    formats = dict.fromkeys((config.format.value, config.grad_format.value))
    rotated = " and ".join(
        axis for axis, on in (("K", config.rotate_k), ("M (dgrad)", config.rotate_m_dgrad)) if on
    )
    scales = "none" if config.format.value == "high_precision" else config.scaling.value
    return " x ".join(formats), scales, rotated or "no", "yes" if config.equalize else "no"
