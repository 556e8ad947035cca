"""Times the Hadamard kernels beside a plain copy and the public kernels (HadaCore, Dao-AILab) where they are installed.

    python benchmarks/bench_hadamard.py                  # the whole grid, a plot and a table under benchmarks/results
    python benchmarks/bench_hadamard.py --dtypes bfloat16 --log-elements 24 --no-save

Each figure is the median over replays of a CUDA graph whose launches go through buffers of at least 512 MB in all, so that
nothing is found in the L2 cache, out of place and in place. All columns of a row come from one run on one GPU. `copy_` into preallocated memory is the bound: it moves the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, save_json

from halo_train import ops
from halo_train.bench import hadamard as core
from halo_train.bench.hadamard import Call, geometric_mean

POWERS = [1024, 2048, 4096, 8192, 16384, 32768]
FORMS = [*POWERS, *core.M_2K]
COLUMNS = [64, 256, 1024, 4096, 16384]


def contenders(n: int) -> dict[str, Call]:
    """Name to call for transforms of order n; a peer that is not installed is left out."""
    scale = 1.0 / math.sqrt(n)
    calls = core.contenders(n)
    if hadacore := _import("faster_hadamard_transform"):
        calls["hadacore"] = lambda x, y: hadacore.hadamard_transform(x, inplace=False)
    if dao := _import("fast_hadamard_transform"):
        calls["dao"] = lambda x, y: dao.hadamard_transform(x, scale)
    return calls


def in_place_contenders(n: int) -> dict[str, Call]:
    scale = 1.0 / math.sqrt(n)
    calls: dict[str, Call] = {"copy": core.copy, "halo_train": lambda x, y: ops.hadamard_(x, n, scale)}
    if hadacore := _import("faster_hadamard_transform"):
        calls["hadacore"] = lambda x, y: hadacore.hadamard_transform(x, inplace=True)
    return calls


def supports(name: str, dtype: torch.dtype) -> bool:
    return name != "hadacore" or dtype in (torch.bfloat16, torch.float16)


def accuracy(sizes: list[int]) -> list[dict[str, Any]]:
    """Share of the elements that differ from the float64 result rounded once, and the largest error in row RMS."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for n in sizes:
            x = torch.randn((1 << 22) // n, n, device="cuda").to(dtype)
            exact = x.double()
            half = 1
            while half < n:
                pairs = exact.reshape(-1, 2, half)
                exact = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
                half *= 2
            exact = exact.reshape(-1, n) / math.sqrt(n)
            rms = exact.square().mean(dim=1, keepdim=True).sqrt()
            row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "n": n}
            for name, call in contenders(n).items():
                if name != "copy":
                    y = call(x, x)
                    row[name] = {
                        "mismatches": (y != exact.to(dtype)).double().mean().item(),
                        "relative_rms_error": ((y.double() - exact) / rms).square().mean().sqrt().item(),
                    }
            rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What the project promises about this grid, in sentences."""
    lines = core.summary(rows)
    rivals = [
        (row, min(row[name] for name in ("hadacore", "dao") if name in row)) for row in rows if "dao" in row
    ]
    if rivals:
        row, best = min(rivals, key=lambda pair: pair[1] / pair[0]["halo_train"])
        mean = geometric_mean([best / row["halo_train"] for row, best in rivals if row["log_elements"] >= 22])
        lines.append(
            f"Against the better of HadaCore and Dao: {mean:.3f} times as fast in the geometric mean from 2^22 elements; "
            f"closest cell {best / row['halo_train']:.3f} ({row['dtype']}, n={row['n']}, 2^{row['log_elements']})."
        )
    return lines


def save(record: dict[str, Any], folder: Path) -> None:
    path = save_json("hadamard", record, folder)
    path.with_suffix(".md").write_text(markdown(record, path.stem))
    plot(record, path.with_suffix(".png"))


def markdown(record: dict[str, Any], stem: str) -> str:
    env = record["environment"]
    lines = [
        f"# Hadamard kernels on {env['gpu']}, {env['date'][:10]}",
        "",
        f"Driver {env['driver']}, torch {env['torch']}, CUDA {env['cuda']}, commit {env['commit']}, kernels built by nvcc "
        f"{env['kernels'].get('nvcc', '?')}. Command: `python benchmarks/bench_hadamard.py`. Microseconds, cold buffers.",
        "",
        *(f"- {line}" for line in record["summary"]),
        "",
        f"![ratio to copy]({stem}.png)",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in record["cold"]):
        lines += _table(dtype, [row for row in record["cold"] if row["dtype"] == dtype])
    lines += _table("bfloat16 in place", record["in_place"])
    lines += _forms_table("Other forms along rows of n", record["forms"])
    lines += _forms_table("Along the first axis of [n, elements / n]", record["columns"])
    if record["accuracy"]:
        names = [name for name in record["accuracy"][0] if name not in ("dtype", "n")]
        lines += ["", "## Elements that differ from the float64 result rounded once", ""]
        lines += [
            "| dtype | n | " + " | ".join(names) + " |",
            "|---" * (len(names) + 2) + "|",
        ]
        for row in record["accuracy"]:
            lines.append(
                f"| {row['dtype']} | {row['n']} | "
                + " | ".join(f"{row[name]['mismatches']:.1e}" for name in names)
                + " |"
            )
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in ("copy", "halo_train", "hadacore", "dao") if name in rows[0]]
    logs = list(dict.fromkeys(row["log_elements"] for row in rows))
    head = [
        "",
        f"## {title}: {' / '.join(names)}",
        "",
        "| n | " + " | ".join(f"2^{log}" for log in logs) + " |",
    ]
    lines = [*head, "|---" * (len(logs) + 1) + "|"]
    for n in dict.fromkeys(row["n"] for row in rows):
        cells = {row["log_elements"]: row for row in rows if row["n"] == n}
        figures = [" / ".join(_figure(cells[log][name]) for name in names) for log in logs]
        lines.append(f"| {n} | " + " | ".join(figures) + " |")
    return lines


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["cold"] if row["dtype"] == record["cold"][0]["dtype"]]
    logs = list(dict.fromkeys(row["log_elements"] for row in rows))
    figure, axes = plt.subplots(1, len(logs), figsize=(3.2 * len(logs), 3.6), sharey=True, squeeze=False)
    styles = {"halo_train": ("o-", "tab:blue"), "hadacore": ("s--", "tab:orange"), "dao": ("^:", "tab:gray")}
    for axis, log in zip(axes[0], logs, strict=True):
        cells = [row for row in rows if row["log_elements"] == log]
        for name, (style, color) in styles.items():
            points = [(row["n"], row[name] / row["copy"]) for row in cells if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=4)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0.9, 3.0)
        axis.set_title(f"2^{log} elements")
        axis.set_xlabel("n")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time / time of copy_")
    axes[0][0].legend()
    env = record["environment"]
    figure.suptitle(
        f"Hadamard transform, {rows[0]['dtype']}, {env['gpu']}, torch {env['torch']}, {env['date'][:10]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _forms_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """Times over that of copy_."""
    names = list(
        dict.fromkeys(name for row in rows for name in row if name not in ("dtype", "log_elements", "n"))
    )
    lines = ["", f"## {title}: copy in microseconds, then times over copy", ""]
    lines += ["| dtype | elements | n | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        figures = [_figure(row["copy"])] + [
            f"{row[name] / row['copy']:.3f}" if name in row else "" for name in names[1:]
        ]
        lines.append(
            f"| {row['dtype']} | 2^{row['log_elements']} | {row['n']} | " + " | ".join(figures) + " |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = core.arguments(
        argparse.ArgumentParser(description="Hadamard kernels beside copy_ and their peers.")
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON, table and plot")
    parser.add_argument(
        "--commit", default="", help="recorded with the results where there is no git checkout"
    )
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(1, "bench_hadamard: needs a CUDA GPU\n")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    half = [dtype for dtype in dtypes if dtype.itemsize == 2]
    wide = [dtype for dtype in dtypes if dtype.itemsize == 4]
    logs, sizes = arguments.log_elements, arguments.sizes
    rows = core.measure(dtypes, logs, sizes, contenders, supports)
    print("in place")
    in_place = core.measure([torch.bfloat16], logs, sizes, in_place_contenders)
    large = [log for log in logs if log >= 24]
    record = {
        "environment": environment(arguments.commit),
        "summary": summary([row for row in rows if row["dtype"] != "float32"] or rows),
        "cold": rows,
        "in_place": in_place,
        "forms": core.measure(half, large, FORMS, core.forms)
        # Of 512 MB copy_ moves two thirds of its usual bytes a second, which would flatter us.
        + core.measure(wide, [log for log in large if log < 27], POWERS, core.forms),
        "columns": core.measure(dtypes, large, COLUMNS, core.columns),
        "accuracy": accuracy(arguments.sizes),
    }
    print("\n".join(record["summary"]))
    if not arguments.no_save:
        save(record, arguments.output)


if __name__ == "__main__":
    main()
