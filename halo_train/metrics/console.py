"""A sample as a table on the console; needs rich, which the ``train`` extra has."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .products import PRODUCTS
from .sample import MEDIAN, WORST, QuantSample


def sample_table(sample: QuantSample, limit: int = 20) -> Table:
    """Products of the worst layers, SQNR norm-wise / median / tenth percentile in dB, and what another recipe would give.

    Args:
        limit: layers shown, those with the worst single product.
    """
    table = Table(
        title=f"Step {sample.step}: SQNR in dB, norm-wise / median / tenth percentile of tokens (wgrad: columns)",
        caption=f"Sampled blocks of {sample.size.tokens} tokens, {sample.size.out_features} output and "
        f"{sample.size.in_features} input features a layer. Higher is better; 6 dB is a factor of two in error.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")  # names differ at their ends
    for column in ("recipe", *PRODUCTS):
        table.add_column(column)
    rows = sample.aggregates | sample.values
    for name in (WORST, MEDIAN, *sample.worst_first()[:limit]):
        title = name
        for label in sample.compared():
            suffix = f"@{label}" if label else ""
            cells = [_cell(rows[name].get(product + suffix, {})) for product in PRODUCTS]
            if any(cells):
                recipe = f"  if {label}" if label else sample.recipes.get(name, "as run")
                table.add_row(title, recipe, *cells)
                title = ""
        table.add_section()
    return table


class ConsoleSink:
    """Prints :func:`sample_table` of every sample."""

    def __init__(self, limit: int = 5) -> None:
        self._limit, self._console = limit, Console()

    def __call__(self, sample: QuantSample) -> None:
        self._console.print(sample_table(sample, self._limit))


def _cell(stats: dict[str, float]) -> str:
    shown = [f"{stats[name]:.1f}" for name in ("sqnr_db", "median_db", "p10_db") if name in stats]
    return " / ".join(shown)
