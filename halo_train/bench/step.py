"""Times a whole training step of a Llama in bf16 and in 8 bits: ``halo-train bench step``.

Forward, loss, backward and a fused AdamW on random tokens, weights in bfloat16, one precision after another. Needs
transformers.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from halo_train import RECIPES, convert_to_halo_training
from halo_train.training.blocks import checkpoint_activations, compile_blocks
from halo_train.training.loss import TokenLoss

from .linear import require_gpu

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING = get_args(Checkpointing)
Loss = Literal["transformers", "chunked"]
LOSSES = get_args(Loss)
"""transformers' own over the logits of all tokens, or halo_train's, which holds those of a part of them."""
WARM_UP = 3

_CATEGORIES = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "GEMM": ("gemm", "nvjet", "cutlass", "wgmma", "matmul"),
    "rotate and round": ("halo_train", "transpose_bytes"),
    "optimiser": ("multi_tensor", "adam"),
}
"""What the name of a kernel contains, in lower case; the first that fits; everything else is "other"."""


class Size(NamedTuple):
    """Of the model and of its batch."""

    layers: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    batch: int = 2
    length: int = 8192


class Case(NamedTuple):
    """A model to time, with what makes it from the bf16 one."""

    name: str
    convert: Callable[[nn.Module], Any]


def build(
    size: Size, case: Case, *, compiled: bool, checkpointing: Checkpointing, device: str = "cuda"
) -> nn.Module:
    """The model, converted, its decoder layers compiled or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        rope_theta=500000.0,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    case.convert(model.train())
    if checkpointing != "none":
        checkpoint_activations(model, checkpointing)
    if compiled:
        with (
            torch.no_grad()
        ):  # takes the equalisers, which code that recomputes cannot, from tokens as they are trained on
            model.model(input_ids=torch.randint(size.vocabulary, (1, min(1024, size.length)), device=device))
        compile_blocks(model)
    return model


class Training:
    """A model with its optimiser and a fixed batch."""

    def __init__(self, model: nn.Module, size: Size, loss: Loss = "transformers") -> None:
        self.model = model
        self.token_loss = TokenLoss(model) if loss == "chunked" else None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.labels = torch.randint(size.vocabulary, (size.batch, size.length))
        self.tokens = self.labels.to(next(model.parameters()).device)
        self.losses: list[Tensor] = []
        """Of every step so far."""
        self.activation_bytes = 0

    def step(self) -> None:
        before = torch.cuda.memory_allocated()
        loss = self.forward()
        self.activation_bytes = torch.cuda.memory_allocated() - before
        loss.backward()
        self.losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> Tensor:
        if self.token_loss is None:
            return self.model(input_ids=self.tokens, labels=self.tokens).loss
        return self.token_loss(self.tokens, self.labels) / self.labels[:, 1:].numel()


def measure_case(
    size: Size, case: Case, *, compiled: bool, checkpointing: Checkpointing, loss: Loss, steps: int
) -> dict[str, Any]:
    """Milliseconds a step (median), tokens a second, GiB of memory by category, share of GPU time by category."""
    gc.collect()  # the model before: it is part of cycles, and would be counted as there before this one
    torch.cuda.empty_cache()
    start_bytes = torch.cuda.memory_allocated()
    started = time.perf_counter()
    model = build(size, case, compiled=compiled, checkpointing=checkpointing)
    weights = torch.cuda.memory_allocated() - start_bytes
    training = Training(model, size, loss)
    for _ in range(WARM_UP):
        training.step()
    torch.cuda.synchronize()
    warm_up_s = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        training.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() - start_bytes
    ms = 1e3 * statistics.median(times)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    gib = 2.0**30
    return {
        "name": case.name,
        "compiled": compiled,
        "checkpointing": checkpointing,
        "loss": loss,
        "ms": ms,
        "tokens_per_second": size.batch * size.length / ms * 1e3,
        "peak_gib": peak / gib,
        "weights_gib": weights / gib,
        "gradients_gib": parameters / gib,
        "optimiser_gib": 2 * parameters / gib,
        "activations_gib": training.activation_bytes / gib,
        "losses": [each.item() for each in training.losses],
        "warm_up_s": warm_up_s,
        **_profile(training),
    }


def measure(size: Size, cases: Sequence[Case], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each case, mode, checkpointing and loss, printed as they come."""
    print(
        f"{'':>24} {'mode':>8} {'checkpointing':>13} {'loss':>12} {'ms':>7} {'x bf16':>7} {'tokens/s':>9} {'peak GiB':>9} "
        f"{'activations':>11} {'value':>8}  GPU ms by category"
    )
    for mode, checkpointing, loss in itertools.product(args.mode, args.checkpointing, args.loss):
        base = 0.0
        for case in cases:
            compiled = mode == "compiled"
            row = measure_case(
                size, case, compiled=compiled, checkpointing=checkpointing, loss=loss, steps=args.steps
            )
            torch._dynamo.reset()
            base = base or row["ms"]
            row["speedup"] = base / row["ms"]
            parts = "  ".join(f"{name} {ms:.0f}" for name, ms in row["gpu_ms"].items())
            print(
                f"{case.name:>24} {mode:>8} {checkpointing:>13} {loss:>12} {row['ms']:7.1f} {row['speedup']:7.2f} "
                f"{row['tokens_per_second']:9.0f} {row['peak_gib']:9.1f} {row['activations_gib']:11.1f} {row['losses'][-1]:8.4f}  {parts}",
                flush=True,
            )
            yield row


def recipe_case(recipe: str) -> Case:
    """A recipe, applied as users do."""
    if recipe == "bf16":
        return Case("bf16", lambda model: None)
    return Case(recipe, lambda model: convert_to_halo_training(model, recipe=recipe))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--recipes", nargs="+", default=["fp8"], choices=list(RECIPES))
    parser.add_argument("--mode", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--checkpointing", nargs="+", default=["none"], choices=list(CHECKPOINTING))
    parser.add_argument("--loss", nargs="+", default=["transformers"], choices=list(LOSSES))
    parser.add_argument("--steps", type=int, default=8)
    for field, default in Size()._asdict().items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)


def size_of(args: argparse.Namespace) -> Size:
    """The size that the arguments give."""
    return Size(**{field: getattr(args, field) for field in Size._fields})


def recipes(args: argparse.Namespace) -> list[str]:
    """bf16, the base, and the chosen ones."""
    return ["bf16", *(recipe for recipe in args.recipes if recipe != "bf16")]


def main(argv: Sequence[str] | None = None) -> None:
    """``halo-train bench step``."""
    parser = argparse.ArgumentParser(prog="halo-train bench step", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args(argv)
    require_gpu(parser)
    rows = []
    for row in measure(size_of(args), [recipe_case(recipe) for recipe in recipes(args)], args):
        rows.append(row)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _profile(training: Training) -> dict[str, Any]:
    """GPU time of one step in milliseconds: ``gpu_ms`` by category of kernel, ``kernels`` of at least 0.2 ms by name, longest first,
    with calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        training.step()
        torch.cuda.synchronize()
    totals = dict.fromkeys([*_CATEGORIES, "other"], 0.0)
    kernels: list[tuple[str, float, int]] = []
    for event in found.key_averages():
        name, ms = event.key.lower(), event.self_device_time_total / 1e3
        if ms:
            totals[_category_of(name)] += ms
        if ms >= 0.2:
            kernels.append((event.key, ms, event.count))
    return {"gpu_ms": totals, "kernels": sorted(kernels, key=lambda kernel: -kernel[1])}


def _category_of(kernel: str) -> str:
    return next((c for c, marks in _CATEGORIES.items() if any(mark in kernel for mark in marks)), "other")
