"""Times the kernels that round to 8 bits beside a plain copy, in units of the bytes they have to move.

    python benchmarks/bench_quantize.py

Medians over replays of a CUDA graph whose launches take four input buffers in turn (512 MB at the default size). A figure
is the time over that of 3 bytes an element for rows, 6 for both forms of a gradient and 2 for a transposition, at the
bandwidth that `copy_` reaches on the same matrix in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import environment, save_json

from halo_train import ops

SHAPES = {2048: 2048, 4096: 4096, 6144: 2048, 8192: 8192, 11008: 256, 14336: 2048, 16384: 16384, 28672: 4096}
"""Columns and the block they are rotated in."""

BUFFERS = 4
LAUNCHES = 12


def time_us(launch: Callable[[int], Any], replays: int = 7) -> float:
    """Median microseconds of launch(i), i counting the launches."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            launch(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def measure(columns: int, block: int, elements: int) -> dict[str, Any]:
    """Microseconds by kernel, and the same over the time of its bytes at copy speed."""
    rows = elements // columns // 16 * 16
    xs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(BUFFERS)]
    y = torch.empty_like(xs[0])
    d = torch.exp2(torch.randint(-2, 3, (columns,), device="cuda").float())
    row_scale, col_scale = (torch.rand(n, device="cuda") + 0.5 for n in (rows, columns))
    e4m3 = torch.float8_e4m3fn
    q = ops.quantize_rows(xs[0], e4m3)[0]
    calls: dict[str, tuple[int, Callable[[int], Any]]] = {
        "copy": (4, lambda i: y.copy_(xs[i % BUFFERS])),
        "rotated": (3, lambda i: ops.quantize_rows(xs[i % BUFFERS], e4m3, block)),
        "rotated, D": (3, lambda i: ops.quantize_rows(xs[i % BUFFERS], e4m3, block, d)),
        "not rotated": (3, lambda i: ops.quantize_rows(xs[i % BUFFERS], e4m3)),
        "int8, rotated": (3, lambda i: ops.quantize_rows(xs[i % BUFFERS], torch.int8, block)),
        "gradient": (6, lambda i: ops.quantize_grad(xs[i % BUFFERS], e4m3, col_scale, row_scale)),
        "transposed bytes": (2, lambda i: ops.transpose_bytes(q)),
    }
    times = {name: time_us(call) for name, (_, call) in calls.items()}
    ratios = {name: times[name] / times["copy"] * 4 / size for name, (size, _) in calls.items()}
    return {"rows": rows, "columns": columns, "block": block, "us": times, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log-elements", type=int, default=26)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    results = []
    for columns, block in SHAPES.items():
        result = measure(columns, block, 1 << args.log_elements)
        results.append(result)
        cells = [f"{name} {us:.0f} us ({result['ratio'][name]:.2f})" for name, us in result["us"].items()]
        print(f"{columns} in blocks of {block}: " + " | ".join(cells), flush=True)
    if not args.no_save:
        print(save_json("quantize", {"environment": environment(args.commit), "results": results}))


if __name__ == "__main__":
    main()
