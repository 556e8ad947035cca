"""Output layer and loss, forward and backward: transformers' way and TokenLoss, in bfloat16 and 8 bits, time and memory beside the
products alone.

    python benchmarks/bench_loss.py                                # 16384 tokens of Llama-8B's width and vocabulary
    python benchmarks/bench_loss.py --vocab 151936 --hidden 2048   # Qwen's

The weight is float32 (or --weights bfloat16) and the products bfloat16, as under autocast, or those of a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from common import RESULTS, environment, save_json
from torch import Tensor

from halo_train import HaloConfig
from halo_train.bench.linear import require_gpu, settled_us
from halo_train.quantize import Equalizer, equalizer_exponents
from halo_train.training import cross_entropy
from halo_train.training.loss import MAX_LOGITS, MAX_LOGITS_PLAIN, LinearCrossEntropy, LogitMap, chunk_rows
from halo_train.training.output_layer import Rounding

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def transformers_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What ForCausalLMLoss does, summed."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = F.linear(h, weight)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def chunked(most: int, rounding: Rounding | None = None) -> Loss:
    def loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = chunk_rows(most, weight.shape[0])
        return LinearCrossEntropy.apply(h, weight, None, targets, LogitMap(), rows, rounding)

    return loss


def without_kernel(loss: Loss) -> Loss:
    def patched(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with mock.patch.object(cross_entropy, "runs_kernel", return_value=False):
            return loss(h, weight, targets)

    return patched


def products_us(h: Tensor, weight: Tensor) -> float:
    """The three products, of bfloat16 operands that are there."""
    w, e = weight.detach().bfloat16(), torch.randn(h.shape[0], weight.shape[0], device="cuda").bfloat16()
    x = h.detach()
    return sum(settled_us(product) for product in (lambda: x @ w.t(), lambda: e @ w, lambda: e.t() @ x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="where the sources are no git checkout")
    args = parser.parse_args()
    require_gpu(parser)
    torch.manual_seed(0)
    h = torch.randn(args.tokens, args.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(args.vocab, args.hidden, device="cuda").mul_(0.02)
    weight = weight.to(getattr(torch, args.weights)).requires_grad_()
    targets = torch.randint(args.vocab, (args.tokens,), device="cuda")
    equalizer = Equalizer.of_exponents(equalizer_exponents(h.detach(), weight.detach()))
    cases: dict[str, Loss] = {
        "transformers": transformers_loss,
        "TokenLoss, PyTorch's operators": without_kernel(chunked(MAX_LOGITS_PLAIN)),
        "TokenLoss": chunked(MAX_LOGITS),
        "TokenLoss, fp8": chunked(MAX_LOGITS, Rounding(HaloConfig(fast_accum=False), equalizer, None)),
        "TokenLoss, half the logits at a time": chunked(MAX_LOGITS // 2),
        "TokenLoss, a quarter": chunked(MAX_LOGITS // 4),
    }
    products = products_us(h, weight) / 1e3
    print(
        f"{args.tokens} tokens, vocabulary {args.vocab}, width {args.hidden}; products alone {products:.1f} ms"
    )
    rows = []
    for name, loss in cases.items():

        def step(loss: Loss = loss) -> Tensor:
            h.grad = weight.grad = None
            value = loss(h, weight, targets)
            value.backward()
            return value.detach()

        us = settled_us(step)
        h.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = step().item() / args.tokens
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        rows.append(
            {
                "name": name,
                "ms": us / 1e3,
                "beyond_products_ms": us / 1e3 - products,
                "gib": gib,
                "loss": value,
            }
        )
        print(
            f"{name:36} {us / 1e3:7.1f} ms, {us / 1e3 - products:6.1f} beyond the products, {gib:6.2f} GiB with the "
            f"gradients, loss {value:.6f}",
            flush=True,
        )
    settings = {
        "tokens": args.tokens,
        "vocab": args.vocab,
        "hidden": args.hidden,
        "weights": args.weights,
        "products_ms": products,
    }
    record = {"environment": environment(args.commit), "settings": settings, "results": rows}
    print(save_json(f"loss-{args.vocab}", record, args.out))


if __name__ == "__main__":
    main()
