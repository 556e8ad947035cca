"""Times one linear layer, forward and backward in eager mode, with every recipe beside bf16: ``halo-train bench linear``.

A time is the median over steps that are queued one behind the other, as in training: what the host needs to launch a
step counts only where it is longer than what the GPU needs to run it. Backward runs in the calling thread: waking
autograd's own costs a step of one layer as much as a step of a whole model. The layers take turns, in another order each
round and each for a while before it is timed: a GPU at its power limit lowers its clock by what ran in the last tenths of a
second, and one that follows the bf16 layer would else look slower than one that follows an int8 layer.

``--tokens 64 --shape 256x256`` gives what the host needs for a layer: the GPU is done with so little before the next launch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halo_train import RECIPES, HaloConfig, HaloLinear
from halo_train.gemm import matmul
from halo_train.quantize import Quantized

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}
"""(out_features, in_features) of the four linear layers of a Llama-3-8B block, with fused projections."""

WARM_UP = 3
STEPS = 6
ROUNDS = 4
SETTLE_SECONDS = 0.1
"""Defaults of ``--rounds`` and ``--settle``."""


class Case(NamedTuple):
    """A layer to time."""

    name: str
    layer: nn.Module
    gemm_dtype: torch.dtype
    """Of the operands of its three products."""


def time_us(step: Callable[[], Any], steps: int = STEPS, warm_up: int = WARM_UP) -> float:
    """Median microseconds of a step among steps queued one behind the other, by CUDA events."""
    for _ in range(warm_up):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(marks))


def settled_us(step: Callable[[], Any], seconds: float = SETTLE_SECONDS) -> float:
    """:func:`time_us` after the step has run for ``seconds``, over as long, at least STEPS steps."""
    steps = max(STEPS, math.ceil(1e6 * seconds / time_us(step)))
    return time_us(step, steps, warm_up=steps)


def recipe_case(recipe: str, weight: Tensor, config: HaloConfig | None = None) -> Case:
    """A HaloLinear of a recipe around ``weight`` [N, K]; with a config, ``recipe`` is its name."""
    config = config or RECIPES[recipe]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    dtype = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}.get(config.format.value, torch.bfloat16)
    return Case(recipe, HaloLinear.from_linear(linear, config), dtype)


def measure_shape(
    cases: Sequence[Case], x: Tensor, e: Tensor, rounds: int = ROUNDS, settle: float = SETTLE_SECONDS
) -> list[dict[str, float]]:
    """Figures of each case for one input.

    Args:
        cases: the first is the base of the speed-ups.
        x: [M, K] that requires grad; e: [M, N], the gradient of the output.
        rounds: how often each case has its turn, in random order; the median counts.
        settle: seconds that it runs before it is timed, and as long under the clock.

    Returns:
        For each case ``forward_us`` (without autograd), ``both_us`` (forward + backward), ``speedup`` of the latter,
        ``gemm_share`` (of the three products, timed alone, in ``both_us``) and ``saved_bytes`` (kept for backward, an
        8-bit weight included, per element of x).
    """
    steps = [_steps(case.layer, x, e) for case in cases]
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    order, shuffle = list(range(len(cases))), random.Random(0).shuffle
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(rounds):
            shuffle(order)
            for i in order:
                forward, both = steps[i]
                times[i].append((time_us(forward), settled_us(both, settle)))
    gemm_us = {dtype: _gemm_us(x, e, dtype) for dtype in {case.gemm_dtype for case in cases}}
    rows = []
    for case, found in zip(cases, times, strict=True):
        forward_us, both_us = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append(
            {
                "forward_us": forward_us,
                "both_us": both_us,
                "gemm_share": gemm_us[case.gemm_dtype] / both_us,
                "saved_bytes": _saved_bytes(case.layer, x),
            }
        )
    for row in rows:
        row["speedup"] = rows[0]["both_us"] / row["both_us"]
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))


def measure(
    tokens: Sequence[int],
    shapes: dict[str, tuple[int, int]],
    make_cases: Callable[[Tensor], list[Case]],
    rounds: int = ROUNDS,
    settle: float = SETTLE_SECONDS,
) -> list[dict[str, Any]]:
    """One row for each number of tokens, shape and case; prints them as they come.

    Args:
        make_cases: from the weight [N, K], bf16.
        rounds, settle: of :func:`measure_shape`.
    """
    print(
        f"{'tokens':>7} {'layer':>8} {'N':>6} {'K':>6} {'':>24} {'fwd us':>8} {'fwd+bwd us':>11} {'x bf16':>7} {'GEMM':>5} "
        f"{'saved B':>8}"
    )
    rows: list[dict[str, Any]] = []
    for layer, (n, k) in shapes.items():
        cases = make_cases(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5)
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            e = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
            for case, figures in zip(cases, measure_shape(cases, x, e, rounds, settle), strict=True):
                row = {"tokens": m, "layer": layer, "n": n, "k": k, "name": case.name, **figures}
                rows.append(row)
                print(
                    f"{m:7} {layer:>8} {n:6} {k:6} {case.name:>24} {row['forward_us']:8.0f} {row['both_us']:11.0f} "
                    f"{row['speedup']:7.2f} {row['gemm_share']:5.0%} {row['saved_bytes']:8.2f}",
                    flush=True,
                )
    return rows


def geometric_means(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Speed-up by tokens and case over the shapes; prints them."""
    print("\ngeometric mean over the layers, forward + backward, times bf16:")
    means: dict[int, dict[str, float]] = {}
    for m in dict.fromkeys(row["tokens"] for row in rows):
        names = dict.fromkeys(row["name"] for row in rows if row["tokens"] == m)
        means[m] = {
            name: geometric_mean([r["speedup"] for r in rows if (r["tokens"], r["name"]) == (m, name)])
            for name in names
        }
        print(f"{m:7}  " + "  ".join(f"{name} {value:.2f}" for name, value in means[m].items()))
    return means


def main(argv: Sequence[str] | None = None) -> None:
    """``halo-train bench linear``."""
    parser = argparse.ArgumentParser(prog="halo-train bench linear", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args(argv)
    require_gpu(parser)
    rows = measure(
        args.tokens,
        chosen_shapes(args),
        lambda weight: [recipe_case(r, weight) for r in recipes(args)],
        args.rounds,
        args.settle,
    )
    geometric_means(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--recipes", nargs="+", default=["fp8", "fp8_plain", "int8"], choices=list(RECIPES))
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NxK",
        help="out_features x in_features, e.g. 4096x11008; may be repeated; default: the layers of Llama-3-8B",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=ROUNDS,
        help="turns of each layer; their median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=SETTLE_SECONDS,
        help="seconds that a layer runs before it is timed, and as long under the clock (default: %(default)s); of two layers "
        "less than 3%% apart --rounds 8 --settle 0.25 tells more",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def chosen_shapes(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """SHAPES, or those given as NxK."""
    if not args.shape:
        return SHAPES
    found = {}
    for text in args.shape:
        n, _, k = text.partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise SystemExit(f"--shape must be out_features x in_features, e.g. 4096x11008; got {text!r}")
        found[text] = (int(n), int(k))
    return found


def recipes(args: argparse.Namespace) -> list[str]:
    """bf16, the base, and the chosen ones."""
    return ["bf16", *(recipe for recipe in args.recipes if recipe != "bf16")]


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Ends the program where there is none."""
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; torch.cuda.is_available() is False here")


def _steps(layer: nn.Module, x: Tensor, e: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(e)

    return forward, both


def _saved_bytes(layer: nn.Module, x: Tensor) -> float:
    """Bytes of distinct tensors saved for backward, parameters apart, per element of x."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes() >= x.shape[0]:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    layer.zero_grad()  # with a gradient it would look like gradient accumulation, which keeps the rounded weight
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(found.values()) / x.numel()


def _gemm_us(x: Tensor, e: Tensor, dtype: torch.dtype) -> float:
    """The three products alone, on random operands of ``dtype``."""
    (m, k), n = x.shape, e.shape[1]
    sizes = [(m, k, n), (m, n, k), (n, m, k)]
    return sum(_one_gemm_us(rows, contracted, columns, dtype) for rows, contracted, columns in sizes)


def _one_gemm_us(rows: int, contracted: int, columns: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, contracted, device="cuda") for size in (rows, columns))
    if dtype == torch.bfloat16:
        left, right = a.bfloat16(), b.bfloat16()
        return time_us(lambda: left @ right.t())
    if dtype == torch.int8:
        a, b = a * 32, b * 32
    p, q = (Quantized(t.clamp(-127, 127).to(dtype), t.new_ones(t.shape[0])) for t in (a, b))
    return time_us(lambda: matmul(p, q, torch.bfloat16))
