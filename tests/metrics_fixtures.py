"""What the tests of QuantMetrics share: a small model, one step of it, and what a layer saw in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halo_train import HaloConfig, HaloLinear, QuantMetrics, convert_to_halo_training
from halo_train.metrics import sqnr_db

ALL = 1 << 20
"""As sample_size: every row and column."""

FUSED = ["llama", "gemma2", "phi3", "phi"]
"""Families of transformers for :func:`causal_lm`."""


def toy(recipe: str | HaloConfig = "int8", k: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 8))
    convert_to_halo_training(model, recipe=recipe)
    return model


def train_step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def measure(model: nn.Module, x: torch.Tensor, **options) -> dict[str, dict[str, dict[str, float]]]:
    metrics = QuantMetrics(model, sample_size=ALL, **options)
    train_step(model, x)
    assert metrics.step()
    metrics.close()
    return metrics.last.values


def capture(layer: nn.Module) -> dict[str, torch.Tensor]:
    found = {}

    def hook(_, args, y):
        found["x"] = args[0].detach().clone()
        y.register_hook(lambda e: found.update(e=e.clone()))

    layer.register_forward_hook(hook)
    return found


def block_example(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """X [m, k] with hot channels and tokens, W [n, k] with rows and columns of other sizes, E [m, n] with tokens and features of other
    sizes: what one scale a row and scales for blocks and tiles round differently."""
    generator = torch.Generator().manual_seed(1)
    x, w, e = (torch.randn(s, generator=generator) for s in ((m, k), (n, k), (m, n)))
    x[:, ::97] *= 64
    x[::151] *= 30
    w *= torch.exp2(torch.randint(-5, 6, (k,), generator=generator).float())
    e *= torch.randn(m, 1, generator=generator).mul(2).exp() * torch.randn(n, generator=generator).exp()
    return tuple(t.to(dtype) for t in (x, w, e))


def layer_of(recipe: str | HaloConfig, x: torch.Tensor, w: torch.Tensor) -> HaloLinear:
    """With this weight, and the factors that it takes from x."""
    layer = HaloLinear(x.shape[1], w.shape[0], bias=False, device=x.device, dtype=x.dtype, recipe=recipe)
    with torch.no_grad():
        layer.weight.copy_(w)
        layer(x)
    return layer


def assert_measured_as_run(
    layer: HaloLinear, x: torch.Tensor, e: torch.Tensor, by_columns: bool, tolerance: float
) -> None:
    """The figures of dgrad and wgrad are those of the gradients that the layer makes; by_columns: in the form it takes."""
    x = x.requires_grad_()
    with QuantMetrics(nn.Sequential(layer), sample_size=ALL, what_if=[]) as metrics:
        y = layer(x)
        assert y.grad_fn.by_columns == by_columns
        y.backward(e)
        metrics.step()
    exact = {"dgrad": e.double() @ layer.weight.double(), "wgrad": x.double().t() @ e.double()}
    for product, found in (("dgrad", x.grad), ("wgrad", layer.weight.grad.t())):
        true, stats = exact[product], metrics.last.values["0"][product]
        rows = sqnr_db(true, found, dim=1)
        expected = {"sqnr_db": sqnr_db(true, found), "median_db": rows.quantile(0.5), "min_db": rows.min()}
        for stat, value in expected.items():
            assert stats[stat] == pytest.approx(value.item(), abs=tolerance), (product, stat)


def causal_lm(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "use_cache": False}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).train()


def backward_of(model: nn.Module, shape: tuple[int, int] = (3, 20)) -> None:
    ids = torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
