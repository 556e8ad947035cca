"""What QuantMetrics costs: 200 steps with and without, of whole training and of the linear layers alone, and one sample of 224.

    python benchmarks/bench_metrics.py            # about 150 s on an H200; writes benchmarks/results/<date>-metrics-<gpu>.json
    python benchmarks/bench_metrics.py --tiny --device cpu      # shows that it runs

``training_steps`` is the run time that users have: a Llama-3-8B cut to fewer blocks, attention, norms, output layer, loss and
fused AdamW included. In ``linear_steps`` only the linear layers and the products between gate and up run, which makes the share
of the metrics larger. As many of the 32 blocks take part as the time allows. ``all_layers`` times one plain and one sampled
step of the linear layers of all 32 blocks, without repetition of weights.
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, environment, save_json
from llama import Llama, Shape
from torch import nn

from halo_train import QuantMetrics, convert_to_halo_training

BLOCKS = 32
TINY = Shape(2, 64, 4, 2, 224, 128, 64)


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


def blocks_for(build: Callable[[int], Run], duration: float, args: argparse.Namespace) -> int:
    """How many blocks run 2 x ``steps`` steps in so many seconds."""
    times = []
    for blocks in (1, 2):
        run = build(blocks)
        seconds(run, 2, None)
        times.append(seconds(run, 3, None) / 3)
    a_block = max(times[1] - times[0], 0.1 * times[0])  # of tiny ones, noise
    return max(1, min(BLOCKS, 1 + int((duration / (2 * args.steps) - times[0]) / a_block)))


def with_and_without(
    build: Callable[[int], Run], duration: float, args: argparse.Namespace
) -> dict[str, float]:
    """Alternating parts of ``every`` steps with and without, so that clocks and neighbours hit both alike."""
    blocks = args.shape.blocks if args.tiny else blocks_for(build, duration, args)
    run = build(blocks)
    metrics = QuantMetrics(run.model, every=args.every)
    seconds(run, 2, metrics)  # steps 1, sampled, and 2: warm-up of both paths
    with_metrics, without = [], []
    for _ in range(args.steps // args.every):
        metrics.step_number = 0
        reset_peak()
        without.append(seconds(run, args.every, None))
        plain_peak = peak_gib()
        reset_peak()
        # One sample in every ``every`` steps: hooks go on after step every - 1.
        with_metrics.append(seconds(run, args.every, metrics))
        sampled_peak = peak_gib()
        assert metrics.last is not None
        assert metrics.last.step == args.every
    metrics.close()
    steps = len(without) * args.every
    return {
        "blocks": blocks,
        "layers": len(metrics.last.values),
        "steps": steps,
        "ms_per_step_without": 1e3 * sum(without) / steps,
        "ms_per_step_with": 1e3 * sum(with_metrics) / steps,
        "overhead_percent": 100 * (sum(with_metrics) / sum(without) - 1),
        "overhead_percent_by_part": [100 * (a / b - 1) for a, b in zip(with_metrics, without, strict=True)],
        "peak_gib_without": plain_peak,
        "peak_gib_with": sampled_peak,
    }


def all_layers(args: argparse.Namespace) -> dict[str, float]:
    """One sample of every layer against plain steps, and what that is at the given rhythm."""
    gc.collect()  # 32 blocks need the memory of the runs before
    run = linear_run(args.shape.blocks if args.tiny else args.blocks, args.all_layers_tokens, args)
    seconds(run, 1, None)
    reset_peak()
    plain = statistics.median(seconds(run, 1, None) for _ in range(3))
    plain_peak = peak_gib()
    metrics = QuantMetrics(run.model, every=1)
    seconds(run, 1, metrics)
    reset_peak()
    sampled = statistics.median(seconds(run, 1, metrics) for _ in range(2))
    metrics.close()
    assert metrics.last is not None
    return {
        "layers": len(metrics.last.values),
        "tokens": args.all_layers_tokens,
        "values": len(metrics.last.flat()),
        "ms_plain_step": 1e3 * plain,
        "ms_sampled_step": 1e3 * sampled,
        "overhead_percent_at_every": 100 * (sampled - plain) / (args.every * plain),
        "peak_gib_plain": plain_peak,
        "peak_gib_sampled": peak_gib(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--sequences", type=int, default=2, help="of 8192 tokens, in a training step")
    parser.add_argument("--tokens", type=int, default=16384, help="of the linear layers alone")
    parser.add_argument("--all-layers-tokens", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the step that samples every layer")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=150, help="for everything")
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
        args.tokens = args.all_layers_tokens = args.sequences * args.shape.tokens
    return args


def main() -> None:
    args = arguments()
    # Setting up, trying one and two blocks and the step of all layers take about a fifth.
    results = {
        "environment": environment(args.commit),
        "command": " ".join(["python", *sys.argv]),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "training_steps": with_and_without(lambda n: training_run(n, args), 0.5 * args.seconds, args),
        "linear_steps": with_and_without(
            lambda n: linear_run(n, args.tokens, args), 0.3 * args.seconds, args
        ),
        "all_layers": all_layers(args),
    }
    for part in ("training_steps", "linear_steps", "all_layers"):
        print(part)
        for name, value in results[part].items():
            shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.2f}"
            print(f"  {name:<30} {shown}")
    print(f"written: {save_json('metrics', results, args.out)}")


if __name__ == "__main__":
    main()
