"""The report of a run: what 8 bits cost, layer by layer, as one HTML page and as pictures."""

from __future__ import annotations

from pathlib import Path

from halo_train.metrics.records import read_samples

from .advice import Advice, advise
from .page import render_page
from .pictures import draw_pictures

__all__ = ["Advice", "advise", "write_report"]


def write_report(folder: str | Path) -> tuple[list[Path], list[Advice]]:
    """Writes ``quant_report.html`` and three PNGs beside the ``quant.jsonl`` of a run.

    Returns:
        The files, the page first, and the recommendations.

    Raises:
        ValueError: no folder, or no samples in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ValueError(
            f"a report is of the folder of a run; {folder} is {found}; name the folder that has quant.jsonl"
        )
    samples = read_samples(folder / "quant.jsonl")
    if not samples:
        raise ValueError(
            f"{folder / 'quant.jsonl'} has no samples; record some with QuantMetrics(..., sinks=[JsonlSink(path)]), or "
            "with log.quant_every in the run file"
        )
    page = folder / "quant_report.html"
    page.write_text(render_page(folder.resolve().name, samples), encoding="utf-8")
    return [page, *draw_pictures(folder, samples)], advise(samples)
