"""What QuantMetrics costs: a sample of every layer of a Llama-3-8B against a plain step, and 200 steps with and without.

    python benchmarks/bench_metrics.py                     # about 6 min on an H200; writes benchmarks/results/<date>-metrics-eager-<gpu>.json
    python benchmarks/bench_metrics.py --mode compiled --parts training
    python benchmarks/bench_metrics.py --tiny --device cpu      # shows that it runs

``training`` is what users have: whole training steps of transformers' Llama, blocks fused, with attention, norms, output layer, loss
and fused AdamW in bfloat16, of as many of the 32 blocks as memory holds. ``training_200_steps`` runs 200 of them with and 200
without, in parts that alternate. ``linear`` is a harder measure: nothing runs but the linear layers of 32 blocks, one by one, and the products between
gate and up. ``training`` and ``linear`` time plain and sampled steps; the first sample, which loads kernels and finds the allocator cold, is apart.
"""

from __future__ import annotations

import argparse
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
from torch import nn

from halo_train import QuantMetrics, convert_to_halo_training
from halo_train.bench.step import CHECKPOINTING, Size, Training, build, recipe_case

LLAMA_8B = Size(layers=32, batch=1)
TINY = Size(2, 64, 224, 4, 2, 128, 1, 64)

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


def linear_run(blocks: int, args: argparse.Namespace) -> Run:
    """The linear layers of so many blocks, their gradients and that of the input."""
    hidden, intermediate = args.size.hidden, args.size.intermediate
    kv = args.size.kv_heads * hidden // args.size.heads
    torch.manual_seed(0)
    with torch.device(args.device):
        model = nn.Sequential(*(Block(hidden, kv, intermediate) for _ in range(blocks))).bfloat16()
        x = torch.randn(args.tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    convert_to_halo_training(model, recipe=args.recipe)

    def step() -> None:
        for p in (x, *model.parameters()):
            p.grad = None
        y = model(x)
        y.backward(y.detach())  # a square loss

    return Run(model, step)


def training_run(blocks: int, args: argparse.Namespace) -> Run:
    """A whole training step of a Llama, fused as conversion does by default."""
    size = args.size._replace(layers=blocks)
    model = build(
        size,
        recipe_case(args.recipe),
        compiled=args.mode == "compiled",
        checkpointing=args.checkpointing,
        device=args.device,
    )
    return Run(model, Training(model, size).step)


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


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def blocks_that_fit(args: argparse.Namespace) -> int:
    """By the peak memory of sampled steps of one and two blocks."""
    if args.device == "cpu":
        return args.size.layers
    peaks = []
    for blocks in (1, 2):
        run = training_run(blocks, args)
        with QuantMetrics(run.model, every=1) as metrics:
            seconds(run, 1, metrics)
            reset_peak()
            seconds(run, 1, metrics)
        peaks.append(peak_gib())
        del run, metrics
        release()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    room = 0.95 * total - 2 - peaks[0]  # 2: samples that wait until enough are there
    return max(1, min(args.size.layers, 1 + int(room / (peaks[1] - peaks[0]))))


def one_sample(run: Run, tokens: int, args: argparse.Namespace) -> Result:
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
        "blocks": args.size.layers,
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


def training(run: Run, args: argparse.Namespace) -> Result:
    return one_sample(run, args.size.batch * args.size.length, args)


def linear(run: Run, args: argparse.Namespace) -> Result:
    return one_sample(run, args.tokens, args)


def training_200_steps(run: Run, args: argparse.Namespace) -> Result:
    """Alternating parts of ``every`` steps with and without, so that clocks and neighbours hit both alike."""
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
        print(f"  {args.every} steps: {without[-1]:.3f} s without, {with_metrics[-1]:.3f} s with", flush=True)
    metrics.close()
    steps = len(without) * args.every
    return {
        "blocks": args.size.layers,
        "layers": len(metrics.layers),
        "tokens": args.size.batch * args.size.length,
        "steps": steps,
        "ms_per_step_without": 1e3 * sum(without) / steps,
        "ms_per_step_with": 1e3 * sum(with_metrics) / steps,
        "overhead_percent": 100 * (sum(with_metrics) / sum(without) - 1),
        "overhead_percent_by_part": [100 * (a / b - 1) for a, b in zip(with_metrics, without, strict=True)],
    }


PARTS: dict[str, tuple[Callable[[Run, argparse.Namespace], Result], Callable[..., Run]]] = {
    "training": (training, training_run),
    "training_200_steps": (training_200_steps, training_run),
    "linear": (linear, linear_run),
}
"""What is timed, and the model that it is timed on."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--mode", default="eager", choices=["eager", "compiled"], help="of the training steps"
    )
    parser.add_argument("--checkpointing", default="none", choices=list(CHECKPOINTING))
    parser.add_argument("--layers", type=int, help="blocks, instead of as many of 32 as memory holds")
    parser.add_argument("--batch", type=int, help="sequences of 8192 tokens, in a training step")
    parser.add_argument("--tokens", type=int, default=16384, help="of the linear layers alone")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights, to see that it runs")
    parser.add_argument("--commit", help="where the sources are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.every > args.steps:
        parser.error(f"--steps must be at least --every, one sample; got {args.steps} and {args.every}")
    args.size = TINY if args.tiny else LLAMA_8B
    given = {name: getattr(args, name) for name in ("layers", "batch") if getattr(args, name)}
    args.size = args.size._replace(**given)
    if args.tiny:
        args.tokens = args.size.batch * args.size.length
    return args


def main() -> None:
    args = arguments()
    results: Result = {
        "environment": environment(args.commit),
        "command": " ".join(["python", *sys.argv]),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    whole = args.size.layers
    measured = {*args.parts} - {"linear"} and not args.layers
    fitting = blocks_that_fit(args) if measured else whole
    run = built = None
    for part in args.parts:
        measure, build_run = PARTS[part]
        args.size = args.size._replace(layers=whole if part == "linear" else fitting)
        if run is None or build_run is not built:
            run = None
            release()  # the next needs the memory
            run, built = build_run(args.size.layers, args), build_run
        results[part] = measure(run, args)
        print(f"{part}, {args.mode}" if part.startswith("training") else part)
        for name, value in results[part].items():
            shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.2f}"
            print(f"  {name:<30} {shown}", flush=True)
        path = save_json(
            f"metrics-{args.mode}", results, args.out
        )  # by part: a limit of time may end the next
    print(f"written: {path}")


if __name__ == "__main__":
    main()
