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
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, save_json
from torch import Tensor

from halo_train import ops

SIZES = [2**k for k in range(6, 16)]
LOG_ELEMENTS = [20, 22, 24, 25, 27]
COLD_BYTES = 512 << 20

Call = Callable[[Tensor, Tensor], Any]
"""(input, preallocated output of the same shape); those that allocate their own output ignore the second."""


def contenders(n: int) -> dict[str, Call]:
    """Name to call for transforms of order n; a peer that is not installed is left out."""
    scale = 1.0 / math.sqrt(n)
    calls: dict[str, Call] = {
        "copy": lambda x, y: y.copy_(x),
        "halo_train": lambda x, y: ops.hadamard(x, n, scale),
    }
    if hadacore := _import("faster_hadamard_transform"):
        calls["hadacore"] = lambda x, y: hadacore.hadamard_transform(x, inplace=False)
    if dao := _import("fast_hadamard_transform"):
        calls["dao"] = lambda x, y: dao.hadamard_transform(x, scale)
    return calls


def in_place_contenders(n: int) -> dict[str, Call]:
    scale = 1.0 / math.sqrt(n)
    calls: dict[str, Call] = {
        "copy": lambda x, y: y.copy_(x),
        "halo_train": lambda x, y: ops.hadamard_(x, n, scale),
    }
    if hadacore := _import("faster_hadamard_transform"):
        calls["hadacore"] = lambda x, y: hadacore.hadamard_transform(x, inplace=True)
    return calls


def supports(name: str, dtype: torch.dtype) -> bool:
    return name != "hadacore" or dtype in (torch.bfloat16, torch.float16)


def time_us(call: Call, inputs: list[Tensor], outputs: list[Tensor], replays: int = 9) -> float:
    """Median microseconds of one call, over replays of a graph that makes one call for each input."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(inputs[0], outputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []  # or the allocator would give every call the same output, which then stays in the L2 cache
    with torch.cuda.graph(graph):
        for x, y in zip(inputs, outputs, strict=True):
            kept.append(call(x, y))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for replay in range(replays + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def measure(
    dtypes: list[torch.dtype],
    log_elements: list[int],
    sizes: list[int],
    choose: Callable[[int], dict[str, Call]] = contenders,
) -> list[dict[str, Any]]:
    rows = []
    for dtype in dtypes:
        for log in log_elements:
            elements = 2**log
            count = min(256, max(2, COLD_BYTES // (2 * elements * dtype.itemsize)))
            source = torch.randn(count, elements, device="cuda", dtype=torch.float32).to(dtype)
            target = torch.empty_like(source)
            # The first figure must not pay for cold clocks and pages.
            time_us(lambda x, y: y.copy_(x), list(source.unbind()), list(target.unbind()))
            for n in sizes:
                inputs = list(source.view(count, -1, n).unbind())
                outputs = list(target.view(count, -1, n).unbind())
                row: dict[str, Any] = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "log_elements": log,
                    "n": n,
                }
                for name, call in choose(n).items():
                    if supports(name, dtype):
                        row[name] = round(time_us(call, inputs, outputs), 3)
                rows.append(row)
                print(_line(row), flush=True)
            del source, target, inputs, outputs
            torch.cuda.empty_cache()
    return rows


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
    lines = []
    large = [row for row in rows if row["log_elements"] >= 24]
    if large:
        worst = max(large, key=lambda row: row["halo_train"] / row["copy"])
        mean = _geomean([row["halo_train"] / row["copy"] for row in large])
        lines.append(
            f"From 2^24 elements: {mean:.3f} times copy_ in the geometric mean, {worst['halo_train'] / worst['copy']:.3f} at worst "
            f"({worst['dtype']}, n={worst['n']}, 2^{worst['log_elements']})."
        )
    rivals = [
        (row, min(row[name] for name in ("hadacore", "dao") if name in row)) for row in rows if "dao" in row
    ]
    if rivals:
        row, best = min(rivals, key=lambda pair: pair[1] / pair[0]["halo_train"])
        mean = _geomean([best / row["halo_train"] for row, best in rivals if row["log_elements"] >= 22])
        lines.append(
            f"Against the better of HadaCore and Dao: {mean:.2f} times as fast in the geometric mean from 2^22 elements; "
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


def _geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _line(row: dict[str, Any]) -> str:
    names = [name for name in row if name not in ("dtype", "log_elements", "n")]
    times = "  ".join(f"{name} {row[name]:8.2f}" for name in names)
    return f"{row['dtype']:9} 2^{row['log_elements']} n={row['n']:<6} {times}  ratio {row['halo_train'] / row['copy']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Hadamard kernels beside copy_ and their peers.")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--log-elements", nargs="+", type=int, default=LOG_ELEMENTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON, table and plot")
    parser.add_argument(
        "--commit", default="", help="recorded with the results where there is no git checkout"
    )
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_hadamard: needs a CUDA GPU\n")
    rows = measure(
        [getattr(torch, name) for name in arguments.dtypes], arguments.log_elements, arguments.sizes
    )
    print("in place")
    in_place = measure([torch.bfloat16], arguments.log_elements, arguments.sizes, in_place_contenders)
    record = {
        "environment": environment(arguments.commit),
        "summary": summary([row for row in rows if row["dtype"] != "float32"] or rows),
        "cold": rows,
        "in_place": in_place,
        "accuracy": accuracy(arguments.sizes),
    }
    print("\n".join(record["summary"]))
    if not arguments.no_save:
        save(record, arguments.output)


if __name__ == "__main__":
    main()
