"""What QuantMetrics costs on the linear layers of a Llama-3-8B: 200 steps with and without, and one sample of all 224.

    python benchmarks/bench_metrics.py            # about 80 s on an H200; writes benchmarks/results/<date>-metrics-<gpu>.json

Only the linear layers and the products between gate and up run: no attention, norms, loss or optimiser, whose time would
make the share of the metrics smaller. As many of the 32 blocks take part in the 200 steps as the time allows; then one plain
and one sampled step of all 32 blocks, without repetition of weights, are timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, environment, save_json
from torch import nn

from halo_train import QuantMetrics, convert_to_halo_training

BLOCKS = 32


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


def build(blocks: int, args: argparse.Namespace) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model = nn.Sequential(
            *(Block(args.hidden, args.hidden // 4, args.hidden * 7 // 2) for _ in range(blocks))
        )
        torch.set_default_dtype(torch.float32)
    convert_to_halo_training(model, recipe=args.recipe)
    return model


def tokens(count: int, args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(count, args.hidden, device=args.device, dtype=torch.bfloat16, requires_grad=True)


def train_step(model: nn.Module, x: torch.Tensor) -> None:
    for p in (x, *model.parameters()):
        p.grad = None
    y = model(x)
    y.backward(y.detach())  # a square loss


def seconds(model: nn.Module, x: torch.Tensor, steps: int, metrics: QuantMetrics | None) -> float:
    synchronise(x)
    started = time.perf_counter()
    for _ in range(steps):
        train_step(model, x)
        if metrics is not None:
            metrics.step()
    synchronise(x)
    return time.perf_counter() - started


def synchronise(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def peak_gib(x: torch.Tensor) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if x.is_cuda else float("nan")


def reset_peak(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()


def many_steps(args: argparse.Namespace, x: torch.Tensor) -> dict[str, float]:
    """Alternating quarters with and without, so that clocks and neighbours hit both alike."""
    model = build(1, args)
    seconds(model, x, 2, None)
    single = seconds(model, x, 3, None) / 3
    blocks = max(1, min(BLOCKS, int(args.seconds * 0.55 / (2 * args.steps * single))))
    model = build(blocks, args)
    metrics = QuantMetrics(model, every=args.every)
    seconds(model, x, 2, metrics)  # steps 1, sampled, and 2: warm-up of both paths
    metrics.step_number = 0
    with_metrics, without = [], []
    quarter = args.every
    for _ in range(args.steps // quarter):
        metrics.step_number = 0
        reset_peak(x)
        without.append(seconds(model, x, quarter, None))
        plain_peak = peak_gib(x)
        reset_peak(x)
        # One sample in every ``every`` steps: hooks go on after step every - 1.
        with_metrics.append(seconds(model, x, quarter, metrics))
        sampled_peak = peak_gib(x)
        assert metrics.last is not None
        assert metrics.last.step == quarter
    return {
        "blocks": blocks,
        "steps": len(without) * quarter,
        "ms_per_step_without": 1e3 * sum(without) / (len(without) * quarter),
        "ms_per_step_with": 1e3 * sum(with_metrics) / (len(with_metrics) * quarter),
        "overhead_percent": 100 * (sum(with_metrics) / sum(without) - 1),
        "overhead_percent_by_quarter": [
            100 * (a / b - 1) for a, b in zip(with_metrics, without, strict=True)
        ],
        "peak_gib_without": plain_peak,
        "peak_gib_with": sampled_peak,
    }


def all_layers(args: argparse.Namespace, x: torch.Tensor) -> dict[str, float]:
    """One sample of every layer against plain steps, and what that is at the given rhythm."""
    model = build(args.blocks, args)
    seconds(model, x, 1, None)
    reset_peak(x)
    plain = statistics.median(seconds(model, x, 1, None) for _ in range(3))
    plain_peak = peak_gib(x)
    metrics = QuantMetrics(model, every=1)
    seconds(model, x, 1, metrics)
    reset_peak(x)
    sampled = statistics.median(seconds(model, x, 1, metrics) for _ in range(2))
    metrics.close()
    assert metrics.last is not None
    return {
        "layers": len(metrics.last.values),
        "values": len(metrics.last.flat()),
        "ms_plain_step": 1e3 * plain,
        "ms_sampled_step": 1e3 * sampled,
        "overhead_percent_at_every": 100 * (sampled - plain) / (args.every * plain),
        "peak_gib_plain": plain_peak,
        "peak_gib_sampled": peak_gib(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument(
        "--all-layers-tokens", type=int, default=8192, help="fewer, to fit the activations of 32 blocks"
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the step that samples every layer")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=80, help="for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="where the sources are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    x = torch.randn(args.tokens, args.hidden, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    results = {
        "environment": environment(args.commit),
        "command": " ".join(["python", *sys.argv]),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "steps": many_steps(args, x),
        "all_layers": all_layers(args, x),
    }
    for part in ("steps", "all_layers"):
        print(part)
        for name, value in results[part].items():
            shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else f"{value:.2f}"
            print(f"  {name:<30} {shown}")
    print(f"written: {save_json('metrics', results, args.out)}")


if __name__ == "__main__":
    main()
