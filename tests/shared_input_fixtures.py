"""A block in which three layers and two read the same tensor, its unshared twin, and what they are compared by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halo_train import (
    RECIPES,
    HaloConfig,
    HaloLinear,
    convert_to_halo_training,
    equalizer_state_dict,
)
from halo_train.functional import round_input

QUANTISED = [name for name in RECIPES if name != "bf16"]


class Block(nn.Module):
    """q, k, v read h; o reads their sum; gate and up read a second h, down their product. Widths that need padding."""

    def __init__(self, width: int = 40, kv: int = 24, inner: int = 72) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n, bias=n == kv) for n in (width, kv, kv))
        self.o = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.layer_norm(x, x.shape[-1:])
        x = x + self.o(self.q(h) * torch.cat([self.k(h), self.v(h)], -1)[..., : x.shape[-1]])
        h = nn.functional.layer_norm(x, x.shape[-1:])
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


GROUPS = [("q", "k", "v"), ("gate", "up")]


def batch(seed: int = 0, tokens: int = 5) -> Tensor:
    x = torch.randn(2, tokens, 40, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 30
    return x.requires_grad_()


def build(recipe: str | HaloConfig = "fp8", share: bool = True, blocks: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    convert_to_halo_training(model, recipe=recipe, share_inputs=share)
    return model


def settled(recipe: str | HaloConfig = "fp8", blocks: int = 1) -> nn.Sequential:
    """After a first forward and with the groups' factors."""
    model = build(recipe, blocks=blocks)
    with torch.no_grad():
        model(batch())
    equalizer_state_dict(model)
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    """The same weights and factors, nothing shared."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, HaloLinear):
            layer.shared_inputs = None
    return twin


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plain_first(model: nn.Sequential) -> nn.Module:
    """What ``model`` was before its first forward, without sharing."""
    twin = plain_twin(model)
    for layer in twin.modules():
        if isinstance(layer, HaloLinear):
            layer.reset_equalizer()
    return twin


class Pair(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1
        y = self.a(h)
        changed = self.between(h)
        return y + self.b(h if changed is None else changed)


def count_roundings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of round_input, one entry each."""
    calls: list[Any] = []

    def counting(*args: Any) -> Any:
        calls.append(args[0].shape)
        return round_input(*args)

    monkeypatch.setattr("halo_train.shared_input.round_input", counting)
    return calls
