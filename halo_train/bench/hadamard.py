"""Times the Hadamard kernels beside a plain copy on this GPU: ``halo-train bench hadamard``.

A figure is the median over replays of a CUDA graph whose launches go through buffers of at least 512 MB in all, so that nothing
is found in the L2 cache. ``copy_`` into preallocated memory moves the same bytes and is the bound.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_train import hadamard_transform, ops, random_rotation
from halo_train.hadamard import random_signs

SIZES = [2**k for k in range(6, 16)]
LOG_ELEMENTS = [20, 22, 24, 25, 27]
COLD_BYTES = 512 << 20
M_2K = [3072, 5120, 14336, 28672]
"""Full transforms of m 2^k; in blocks of their largest power of two they are the form ``blocks``."""

Call = Callable[[Tensor, Tensor], Any]
"""(input, preallocated output of the same shape); those that allocate their own output ignore the second."""


def copy(x: Tensor, y: Tensor) -> Tensor:
    return y.copy_(x)


def contenders(n: int) -> dict[str, Call]:
    """Name to call for transforms of order n, a power of two."""
    scale = 1.0 / math.sqrt(n)
    return {"copy": copy, "halo_train": lambda x, y: ops.hadamard(x, n, scale)}


def forms(n: int) -> dict[str, Call]:
    """What else the kernels do with rows of n."""
    power = min(n & -n, ops.MAX_BLOCK)
    scale = 1.0 / math.sqrt(power)
    factors = torch.rand(n, device="cuda") + 0.5
    signs = {
        dtype: random_signs(n, 0).to("cuda", dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    calls: dict[str, Call] = {
        "copy": copy,
        "blocks": lambda x, y: ops.hadamard(x, power, scale),
        "factors": lambda x, y: ops.hadamard(x, power, scale, None, factors),
        "factors, in place": lambda x, y: ops.hadamard_(x, power, scale, None, factors),
        "signs": lambda x, y: ops.hadamard(x, power, scale, signs[x.dtype]),
        "two rounds": lambda x, y: random_rotation(x, 0, block=power, rounds=2),
    }
    if power != n:
        calls["m 2^k"] = lambda x, y: hadamard_transform(x, block=n)
    return calls


def columns(n: int) -> dict[str, Call]:
    """A rotation along the rows of [n, columns], and the same by way of a transpose."""
    return {
        "copy": copy,
        "along rows": lambda x, y: hadamard_transform(x.reshape(n, -1), axis=0),
        "by a transpose": lambda x, y: hadamard_transform(x.reshape(n, -1).t().contiguous()),
    }


def time_us(call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor], replays: int = 9) -> float:
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
    dtypes: Sequence[torch.dtype],
    log_elements: Sequence[int],
    sizes: Sequence[int],
    choose: Callable[[int], dict[str, Call]] = contenders,
    supports: Callable[[str, torch.dtype], bool] = lambda name, dtype: True,
) -> list[dict[str, Any]]:
    """One row for each dtype, number of elements (rounded down to whole rows) and row length; prints them as they come.

    Args:
        choose: the calls for a row length; ``copy`` is one of them.
        supports: whether a call takes a dtype.
    """
    rows = []
    for dtype in dtypes:
        for log in log_elements:
            for n in sizes:
                # copy_ loses a third of its speed where the bytes are no multiple of many KB.
                rows_of_n = 2**log // n
                shape = (rows_of_n // 256 * 256 or rows_of_n, n)
                count = min(256, max(2, COLD_BYTES // (2 * math.prod(shape) * dtype.itemsize)))
                inputs = list(
                    torch.randn(count, *shape, device="cuda", dtype=torch.float32).to(dtype).unbind()
                )
                outputs = [torch.empty_like(x) for x in inputs]
                # The first figure must not pay for cold clocks and pages.
                time_us(copy, inputs, outputs)
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
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a grid says, in sentences."""
    large = [row for row in rows if row["log_elements"] >= 24]
    if not large:
        return []
    worst = max(large, key=lambda row: row["halo_train"] / row["copy"])
    mean = geometric_mean([row["halo_train"] / row["copy"] for row in large])
    return [
        f"From 2^24 elements: {mean:.3f} times copy_ in the geometric mean, {worst['halo_train'] / worst['copy']:.3f} at worst "
        f"({worst['dtype']}, n={worst['n']}, 2^{worst['log_elements']})."
    ]


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--log-elements", nargs="+", type=int, default=LOG_ELEMENTS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(
        argparse.ArgumentParser(prog="halo-train bench hadamard", description=__doc__.splitlines()[0])
    )
    parser.add_argument(
        "--forms", action="store_true", help="also m 2^k, signs, factors, two rounds, other axes"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(1, "bench hadamard: needs a CUDA GPU\n")
    dtypes = [getattr(torch, name) for name in args.dtypes]
    record: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    record["cold"] = measure(dtypes, args.log_elements, args.sizes)
    if args.forms:
        record["forms"] = measure(dtypes, args.log_elements, [*args.sizes, *M_2K], forms)
        record["columns"] = measure(dtypes, args.log_elements, args.sizes, columns)
    print("\n".join(summary(record["cold"])))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    names = [name for name in row if name not in ("dtype", "log_elements", "n")]
    figures = "  ".join(f"{name} {row[name]:.2f} ({row[name] / row['copy']:.3f})" for name in names)
    return f"{row['dtype']:9} 2^{row['log_elements']} n={row['n']:<6} {figures}"
