"""What QuantMetrics costs: a sample of every layer of a Llama-3-8B against a plain step, and 200 steps with and without.

    python benchmarks/bench_metrics.py            # under 100 s on an H200; writes benchmarks/results/<date>-metrics-<gpu>.json
    python benchmarks/bench_metrics.py --tiny --device cpu      # shows that it runs

``training`` is what users have: whole training steps, with attention, norms, output layer, loss and fused AdamW, of as many of
the 32 blocks as memory holds. ``linear`` is the harder measure: nothing runs but the linear layers of all 32 blocks and the products between
gate and up. Both time plain and sampled steps; the first sample, which loads kernels and finds the allocator cold, is apart. ``linear_200_steps``
runs 200 steps with and 200 without, in parts that alternate, of as many blocks as the time allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, environment, save_json
from llama import Llama, Shape
from torch import nn

from halo_train import QuantMetrics, convert_to_halo_training

BLOCKS = 32
TINY = Shape(2, 64, 4, 2, 224, 128, 64)


Result = dict[str, Any]


class Run(NamedTuple):
    """A converted model and one training step of it."""

    model: nn.Module
    step: Callable[[], None]


class Block(nn.Module):
    """The seven linear layers of a Llama-3-8B block, [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden: int, kv: int, intermediate: int) -> None:
        super().__init__()
        widths = {"q": hidden, "k": kv, "v": kv, "gate": intermediate, "up": intermediate}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(hidden, width, bias=False))
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.shape[-1] // self.k.out_features
        attended = self.q(x) * (self.k(x) + self.v(x)).repeat(1, groups)
        x = x + self.o(attended)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def linear_run(blocks: int, tokens: int, args: argparse.Namespace) -> Run:
    """The linear layers of so many blocks, their gradients and that of the input."""
    hidden, kv, intermediate = args.shape.hidden, args.shape.kv_heads * args.head, args.shape.intermediate
    torch.manual_seed(0)
    with torch.device(args.device):
        model = nn.Sequential(*(Block(hidden, kv, intermediate) for _ in range(blocks))).bfloat16()
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    convert_to_halo_training(model, recipe=args.recipe)

    def step() -> None:
        for p in (x, *model.parameters()):
            p.grad = None
        y = model(x)
        y.backward(y.detach())  # a square loss

    return Run(model, step)


def training_run(blocks: int, args: argparse.Namespace) -> Run:
    """A training step of a Llama: weights, gradients and moments in bfloat16."""
    torch.manual_seed(0)
    shape = dataclasses.replace(args.shape, blocks=blocks)
    with torch.device(args.device):
        model = Llama(shape).bfloat16()
        tokens = torch.randint(shape.vocabulary, (args.sequences, shape.tokens + 1))
    convert_to_halo_training(model, recipe=args.recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, step)


def seconds(run: Run, steps: int, metrics: QuantMetrics | None) -> float:
    synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        run.step()
        if metrics is not None:
            metrics.step()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def blocks_that_fit(build: Callable[[int], Run], args: argparse.Namespace) -> int:
    """By the peak memory of steps of one and two blocks, with room for a sample."""
    peaks = []
    for blocks in (1, 2):
        run = build(blocks)
        seconds(run, 1, None)
        reset_peak()
        seconds(run, 1, None)
        peaks.append(peak_gib())
        del run
        gc.collect()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    a_block = peaks[1] - peaks[0] + 0.15  # of sampled rows and columns
    return max(1, min(args.blocks, 1 + int((0.95 * total - 3 - peaks[0]) / a_block)))


def blocks_for(build: Callable[[int], Run], args: argparse.Namespace) -> int:
    """How many blocks run 2 x ``steps`` steps in ``seconds``."""
    times = []
    for blocks in (1, 2):
        run = build(blocks)
        seconds(run, 2, None)
        times.append(seconds(run, 3, None) / 3)
    a_block = max(times[1] - times[0], 0.1 * times[0])  # of tiny ones, noise
    return max(1, min(args.blocks, 1 + int((args.seconds / (2 * args.steps) - times[0]) / a_block)))


def one_sample(run: Run, blocks: int, tokens: int, args: argparse.Namespace) -> Result:
    """Plain steps and sampled ones, and what that is at the given rhythm."""
    seconds(run, 2, None)
    reset_peak()
    plain = statistics.median(seconds(run, 1, None) for _ in range(5))
    plain_peak = peak_gib()
    with QuantMetrics(run.model, every=1) as metrics:
        first = seconds(run, 1, metrics)
        reset_peak()
        samples = [seconds(run, 1, metrics) for _ in range(4)]
        sampled_peak = peak_gib()
    assert metrics.last is not None
    sampled = statistics.median(samples)
    return {
        "blocks": blocks,
        "layers": len(metrics.last.values),
        "tokens": tokens,
        "values": len(metrics.last.flat()),
        "ms_plain_step": 1e3 * plain,
        "ms_first_sampled_step": 1e3 * first,
        "ms_sampled_steps": [1e3 * sample for sample in samples],
        "ms_more_a_layer": 1e3 * (sampled - plain) / len(metrics.last.values),
        "overhead_percent": 100 * (sampled - plain) / (args.every * plain),
        "peak_gib_plain": plain_peak,
        "peak_gib_sampled": sampled_peak,
    }


def training(args: argparse.Namespace) -> Result:
    def build(blocks: int) -> Run:
        return training_run(blocks, args)

    blocks = args.blocks if args.tiny else blocks_that_fit(build, args)
    return one_sample(build(blocks), blocks, args.sequences * args.shape.tokens, args)


def linear(args: argparse.Namespace) -> Result:
    return one_sample(linear_run(args.blocks, args.tokens, args), args.blocks, args.tokens, args)


def linear_200_steps(args: argparse.Namespace) -> Result:
    """Alternating parts of ``every`` steps with and without, so that clocks and neighbours hit both alike."""

    def build(blocks: int) -> Run:
        return linear_run(blocks, args.tokens, args)

    blocks = args.blocks if args.tiny else blocks_for(build, args)
    run = build(blocks)
    metrics = QuantMetrics(run.model, every=args.every)
    seconds(run, 2, metrics)  # steps 1, sampled, and 2: warm-up of both paths
    with_metrics, without = [], []
    for _ in range(args.steps // args.every):
        metrics.step_number = 0
        without.append(seconds(run, args.every, None))
        # One sample in every ``every`` steps: hooks go on after step every - 1.
        with_metrics.append(seconds(run, args.every, metrics))
        assert metrics.last is not None
        assert metrics.last.step == args.every
    metrics.close()
    steps = len(without) * args.every
    return {
        "blocks": blocks,
        "layers": len(metrics.layers),
        "tokens": args.tokens,
        "steps": steps,
        "ms_per_step_without": 1e3 * sum(without) / steps,
        "ms_per_step_with": 1e3 * sum(with_metrics) / steps,
        "overhead_percent": 100 * (sum(with_metrics) / sum(without) - 1),
        "overhead_percent_by_part": [100 * (a / b - 1) for a, b in zip(with_metrics, without, strict=True)],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--sequences", type=int, default=1, help="of 8192 tokens, in a training step")
    parser.add_argument("--tokens", type=int, default=16384, help="of the linear layers alone")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30, help="for the 200 steps")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights, to see that it runs")
    parser.add_argument("--commit", help="where the sources are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.every > args.steps:
        parser.error(f"--steps must be at least --every, one sample; got {args.steps} and {args.every}")
    args.shape = TINY if args.tiny else Shape()
    args.head = args.shape.hidden // args.shape.heads
    if args.tiny:
        args.blocks, args.tokens = args.shape.blocks, args.sequences * args.shape.tokens
    return args


def main() -> None:
    args = arguments()
    results: Result = {
        "environment": environment(args.commit),
        "command": " ".join(["python", *sys.argv]),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    for part in (training, linear, linear_200_steps):
        results[part.__name__] = part(args)
        gc.collect()  # the next needs the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(part.__name__)
        for name, value in results[part.__name__].items():
            shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.2f}"
            print(f"  {name:<30} {shown}", flush=True)
    print(f"written: {save_json('metrics', results, args.out)}")


if __name__ == "__main__":
    main()
