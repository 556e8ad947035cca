"""Times the kernels that round to 8 bits beside a plain copy and torchao's cast, in units of the bytes they have to move.

    python benchmarks/bench_quantize.py

Medians over replays of a CUDA graph whose launches take four input buffers in turn (512 MB at the default size). A figure
is the time over that of the bytes named in CASES, an element, at the bandwidth that `copy_` reaches on the same matrix in
the same run. Where torchao is importable: its compiled cast with row scales, after this library's rotation.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import environment, save_json
from torch import Tensor

from halo_train import ops

SHAPES = {2048: 2048, 4096: 4096, 6144: 2048, 8192: 8192, 11008: 256, 14336: 2048, 16384: 16384, 28672: 4096}
"""Columns and the block they are rotated in."""

CASES = {
    "copy": 4,
    "rotated": 3,
    "rotated, D": 3,
    "rotated, int8": 3,
    "rotated, float32": 5,
    "not rotated": 3,
    "columns": 5,
    "columns, tiles": 3,
    "gradient": 6,
    "gradient, folded": 6,
    "gradient, sums": 6,
    "gradient, blocks": 4,
    "gradient, blocks, folded": 4,
    "gradient, blocks, sums": 4,
    "one scale": 5,
    "one scale, rotated": 5,
    "transposed bytes": 2,
    "hadamard, then torchao": 3,
}
"""Bytes that a case has to move for an element: its input read, once or for both passes, and its output written."""

BUFFERS = 4
LAUNCHES = 12
E4M3 = torch.float8_e4m3fn


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


def torchao_cast() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """torchao's rounding to e4m3 with row scales, compiled; None without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    @torch.compile(dynamic=False)
    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        q = hp_tensor_to_float8_dynamic(
            x, E4M3, LinearMMConfig(), scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=-1
        )
        return q._data, q._scale

    return cast


def measure(columns: int, block: int, elements: int, cast: Callable[[Tensor], Any] | None) -> dict[str, Any]:
    """Microseconds by case, and the same over the time of its bytes at copy speed."""
    rows = elements // columns // 16 * 16
    xs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(BUFFERS)]
    wide = [x.float() for x in xs]
    y = torch.empty_like(xs[0])
    d = torch.exp2(torch.randint(-2, 3, (columns,), device="cuda").float())
    row_scale, col_scale = (torch.rand(n, device="cuda") + 0.5 for n in (rows, columns))
    qs = [ops.quantize_rows(x, E4M3)[0] for x in xs]
    norm = 1 / math.sqrt(block)
    calls: dict[str, Callable[[int], Any]] = {
        "copy": lambda i: y.copy_(xs[i % BUFFERS]),
        "rotated": lambda i: ops.quantize_rows(xs[i % BUFFERS], E4M3, block),
        "rotated, D": lambda i: ops.quantize_rows(xs[i % BUFFERS], E4M3, block, d),
        "rotated, int8": lambda i: ops.quantize_rows(xs[i % BUFFERS], torch.int8, block),
        "rotated, float32": lambda i: ops.quantize_rows(wide[i % BUFFERS], E4M3, block),
        "not rotated": lambda i: ops.quantize_rows(xs[i % BUFFERS], E4M3),
        "columns": lambda i: ops.quantize_rows_transposed(xs[i % BUFFERS], E4M3),
        "columns, tiles": lambda i: ops.quantize_tiles(xs[i % BUFFERS], E4M3),
        "gradient": lambda i: ops.quantize_grad(xs[i % BUFFERS], E4M3, None, row_scale),
        "gradient, folded": lambda i: ops.quantize_grad(xs[i % BUFFERS], E4M3, col_scale, row_scale),
        "gradient, sums": lambda i: ops.quantize_grad(
            xs[i % BUFFERS], E4M3, None, row_scale, column_sums=True
        ),
        "gradient, blocks": lambda i: ops.quantize_grad_blocks(xs[i % BUFFERS], E4M3, None, row_scale),
        "gradient, blocks, folded": lambda i: ops.quantize_grad_blocks(
            xs[i % BUFFERS], E4M3, col_scale, row_scale
        ),
        "gradient, blocks, sums": lambda i: ops.quantize_grad_blocks(
            xs[i % BUFFERS], E4M3, None, row_scale, column_sums=True
        ),
        "one scale": lambda i: ops.quantize_tensor(xs[i % BUFFERS], E4M3),
        "one scale, rotated": lambda i: ops.quantize_tensor(xs[i % BUFFERS], E4M3, block),
        "transposed bytes": lambda i: ops.transpose_bytes(qs[i % BUFFERS]),
    }
    if torch.cuda.get_device_capability() < (9, 0):
        calls = {name: call for name, call in calls.items() if "blocks" not in name and "tiles" not in name}
    if cast is not None:
        calls["hadamard, then torchao"] = lambda i: cast(ops.hadamard(xs[i % BUFFERS], block, norm))
    times = {name: time_us(call) for name, call in calls.items()}
    ratios = {name: us / times["copy"] * 4 / CASES[name] for name, us in times.items()}
    return {"rows": rows, "columns": columns, "block": block, "us": times, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log-elements", type=int, default=26)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    cast = torchao_cast()
    results: list[dict[str, Any]] = []
    for columns, block in SHAPES.items():
        result = measure(columns, block, 1 << args.log_elements, cast)
        names = [name for name in CASES if name in result["us"]]
        if not results:
            print("| K | block | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
        results.append(result)
        cells = [f"{result['us'][name]:.0f} ({result['ratio'][name]:.2f})" for name in names]
        print(f"| {columns} | {block} | " + " | ".join(cells) + " |", flush=True)
    if not args.no_save:
        print(save_json("quantize", {"environment": environment(args.commit), "results": results}))


if __name__ == "__main__":
    main()
