"""Times one linear layer, forward and backward in eager mode, with every recipe beside bf16, on shapes of Llama-3-8B.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --tokens 2048 8192 --recipes bf16 fp8 --no-save

Each figure is the median of the timed repetitions of forward + backward; the gradient of the output is random, and all
recipes of a shape run one after another on one GPU. `saved` is what the layer keeps for backward, in bytes per element
of X, measured as allocated memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import environment, save_json

from halo_train import RECIPES, HaloLinear

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
"""(out_features, in_features) of the four linear layers of a Llama-3-8B block, with fused projections."""

WARM_UP = 3


def time_us(step: Callable[[], Any], repetitions: int) -> float:
    """Median microseconds of a step, by CUDA events."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def measure(tokens: int, n: int, k: int, recipe: str, repetitions: int) -> dict[str, float]:
    """Microseconds of forward and of forward + backward, and saved bytes per element of X."""
    layer = HaloLinear(k, n, bias=False, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)

    def both() -> None:
        x.grad = layer.weight.grad = None
        layer(x).backward(e)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    both()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    # bf16 keeps X and W themselves, which are alive anyway; count X, as the layer prevents its release.
    saved += x.numel() * x.element_size() if recipe == "bf16" else 0
    del y
    return {
        "forward_us": time_us(forward, repetitions),
        "both_us": time_us(both, repetitions),
        "saved_bytes_per_x": saved / x.numel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if "bf16" not in args.recipes:
        parser.error("--recipes must include bf16, which the ratios are to")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")

    rows: list[dict[str, Any]] = []
    print(
        f"{'tokens':>7} {'layer':>8} {'N':>6} {'K':>6} {'recipe':>11} {'fwd us':>8} {'fwd+bwd us':>11} {'x bf16':>7} {'saved':>6}"
    )
    for tokens in args.tokens:
        for layer, (n, k) in SHAPES.items():
            for recipe in sorted(args.recipes, key=lambda name: name != "bf16"):
                figures = measure(tokens, n, k, recipe, args.repetitions)
                row = {"tokens": tokens, "layer": layer, "n": n, "k": k, "recipe": recipe, **figures}
                rows.append(row)
                base = next(
                    r for r in rows if r["tokens"] == tokens and r["layer"] == layer and r["recipe"] == "bf16"
                )
                row["speedup"] = base["both_us"] / row["both_us"]
                print(
                    f"{tokens:7} {layer:>8} {n:6} {k:6} {recipe:>11} {row['forward_us']:8.0f} {row['both_us']:11.0f} "
                    f"{row['speedup']:7.2f} {row['saved_bytes_per_x']:6.2f}",
                    flush=True,
                )
    print("\ngeometric mean over the layers, times bf16:")
    means = {}
    for tokens in args.tokens:
        for recipe in args.recipes:
            ratios = [r["speedup"] for r in rows if r["tokens"] == tokens and r["recipe"] == recipe]
            means[f"{tokens} {recipe}"] = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"{tokens:7} {recipe:>11} {means[f'{tokens} {recipe}']:.2f}")
    if not args.no_save:
        record = {"environment": environment(args.commit), "rows": rows, "geometric_means": means}
        print(f"\n{save_json('linear', record)}")


if __name__ == "__main__":
    main()
