"""Times the kernels that fuse norms and gated activations with rounding, in units of the bytes they have to move.

    python benchmarks/bench_fused_quantize.py

Beside each the unfused sequence: PyTorch's norm, or the activation as torch.compile writes it, and then this library's
rounding. A figure is the time over that of the bytes of BYTES, an element, at the bandwidth that `copy_` reaches on the
same matrix in the same run. Inputs take turns, more of them than the L2 cache holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_quantize import time_us
from common import environment, save_json
from torch import Tensor

from halo_train import ops

WIDTHS = {2048: 2048, 4096: 4096, 5120: 1024, 8192: 8192, 16384: 16384}
GATED_WIDTHS = {8192: 8192, 11008: 256, 14336: 2048, 28672: 4096}
"""Columns and the block they are rotated in."""

BYTES = {
    "rms": 3,
    "rms, not rotated": 3,
    "layer norm": 3,
    "gated": 5,
    "gated, not rotated": 5,
    "gated, erf": 5,
    "gradients": 16,
    "gradients, blocks": 10,
    "weight": 5,
}
"""Bytes that a case has to move for an element: inputs, read once or for both passes, and outputs."""

E4M3 = torch.float8_e4m3fn
CACHE = 128 << 20


def compiled_gate() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda g, u: F.silu(g) * u, dynamic=False)


def compiled_gradients() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def gradients(e: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        e, g, u = e.float(), g.float(), u.float()
        s = torch.sigmoid(g)
        value = g * s
        return (e * u * (s + value * (1 - s))).bfloat16(), (e * value).bfloat16()

    return torch.compile(gradients, dynamic=False)


def cases(rows: int, columns: int, block: int, gated: bool) -> dict[str, tuple[Callable[[int], Any], ...]]:
    """Fused and unfused calls by case."""
    buffers = max(2, CACHE // (2 * rows * columns))
    xs, ups, es = (
        [
            torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            for _ in range(buffers if wanted else 0)
        ]
        for wanted in (True, gated, gated)
    )
    y = torch.empty_like(xs[0])
    d = torch.exp2(torch.randint(-2, 3, (columns,), device="cuda").float())
    w = torch.rand(columns, device="cuda").bfloat16()
    s = torch.rand(rows, device="cuda") + 0.5

    def turn(tensors: list[Tensor], i: int) -> Tensor:
        return tensors[i % buffers]

    found: dict[str, tuple[Callable[[int], Any], ...]] = {"copy": (lambda i: y.copy_(turn(xs, i)),)}
    if not gated:
        found["rms"] = (
            lambda i: ops.norm_quantize(turn(xs, i), w, None, 1e-5, False, E4M3, block, d),
            lambda i: ops.quantize_rows(F.rms_norm(turn(xs, i), (columns,), w, 1e-5), E4M3, block, d),
        )
        found["rms, not rotated"] = (
            lambda i: ops.norm_quantize(turn(xs, i), w, None, 1e-5, False, E4M3, 1, d),
        )
        found["layer norm"] = (
            lambda i: ops.norm_quantize(turn(xs, i), w, w, 1e-5, True, E4M3, block, d),
            lambda i: ops.quantize_rows(F.layer_norm(turn(xs, i), (columns,), w, w, 1e-5), E4M3, block, d),
        )
        found["weight"] = (lambda i: ops.quantize_rows_transposed(turn(xs, i), E4M3),)
        return found
    gate, gradients = compiled_gate(), compiled_gradients()
    found["gated"] = (
        lambda i: ops.gated_quantize(turn(xs, i), turn(ups, i), "silu", E4M3, block, d),
        lambda i: ops.quantize_rows(gate(turn(xs, i), turn(ups, i)), E4M3, block, d),
    )
    found["gated, not rotated"] = (
        lambda i: ops.gated_quantize(turn(xs, i), turn(ups, i), "silu", E4M3, 1, d),
    )
    found["gated, erf"] = (lambda i: ops.gated_quantize(turn(xs, i), turn(ups, i), "gelu", E4M3, block, d),)

    def unfused(i: int) -> None:
        for gradient in gradients(turn(es, i), turn(xs, i), turn(ups, i)):
            ops.quantize_grad(gradient, E4M3, None, s)

    found["gradients"] = (
        lambda i: ops.gated_grad_quantize(turn(es, i), turn(xs, i), turn(ups, i), "silu", E4M3, s),
        unfused,
    )
    if torch.cuda.get_device_capability() >= (9, 0):
        found["gradients, blocks"] = (
            lambda i: ops.gated_grad_blocks(turn(es, i), turn(xs, i), turn(ups, i), "silu", E4M3, s),
        )
    return found


def measure(rows: int, columns: int, block: int, gated: bool) -> dict[str, Any]:
    times = {
        name: [time_us(call) for call in calls] for name, calls in cases(rows, columns, block, gated).items()
    }
    copy = times.pop("copy")[0] / 4
    ratios = {name: us[0] / copy / BYTES[name] for name, us in times.items()}
    return {"rows": rows, "columns": columns, "block": block, "copy": 4 * copy, "us": times, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[16384, 2048])
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    results = []
    for gated, widths in ((False, WIDTHS), (True, GATED_WIDTHS)):
        for rows in args.rows:
            for columns, block in widths.items():
                result = measure(rows, columns, block, gated)
                results.append(result)
                cells = [
                    f"{name} {us[0]:.0f} us ({result['ratio'][name]:.2f}{f', unfused {us[1]:.0f}' if us[1:] else ''})"
                    for name, us in result["us"].items()
                ]
                print(
                    f"{rows} x {columns} / {block}: copy {result['copy']:.0f}; " + "; ".join(cells),
                    flush=True,
                )
                torch.cuda.empty_cache()
    if not args.no_save:
        print(save_json("fused-quantize", {"environment": environment(args.commit), "results": results}))


if __name__ == "__main__":
    main()
