"""What the tests of QuantMetrics share: a small model, one step of it, and what a layer saw in it."""

from __future__ import annotations

import torch
from torch import nn

from halo_train import HaloConfig, QuantMetrics, convert_to_halo_training

ALL = 1 << 20
"""As sample_size: every row and column."""


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
