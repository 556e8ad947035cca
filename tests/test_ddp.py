"""DistributedDataParallel around a converted model: two gloo processes on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from fsdp_fixtures import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halo_train import collect_equalizers, convert_to_halo_training, equalizer_state_dict

RECIPE = "fp8"


def build() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    convert_to_halo_training(model, recipe=RECIPE)
    return model


def batch(step: int, rank: int) -> torch.Tensor:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(10 * step + rank))
    x[:, rank] *= 50
    return x


def train(rank: int, world: int, device: str, folder: Path) -> None:
    model = DistributedDataParallel(build())
    for step in range(2):
        model.zero_grad()
        model(batch(step, rank)).square().mean().backward()
    result = {
        "grads": [p.grad for p in model.parameters()],
        "equalizer": equalizer_state_dict(model.module),
    }
    torch.save(result, folder / f"rank{rank}.pt")


def test_gradients_are_the_mean_over_ranks_with_one_equalizer(tmp_path: Path):
    run_on_ranks([train], 2, "cpu", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    # DDP broadcasts buffers before each forward: after the first step both ranks use the factors of rank 0.
    for name, exponent in ranks[0]["equalizer"].items():
        assert torch.equal(exponent, ranks[1]["equalizer"][name])
    for a, b in zip(ranks[0]["grads"], ranks[1]["grads"], strict=True):
        assert torch.equal(a, b)

    alone = build()
    alone(batch(0, 0))  # rank 0's first batch gives the equalizer
    grads = []
    for rank in range(2):
        alone.zero_grad()
        alone(batch(1, rank)).square().mean().backward()
        grads.append([p.grad.clone() for p in alone.parameters()])
    for ours, g0, g1 in zip(ranks[0]["grads"], *grads, strict=True):
        torch.testing.assert_close(ours, (g0 + g1) / 2)


def collect(rank: int, world: int, device: str, folder: Path) -> None:
    model = DistributedDataParallel(build())
    with collect_equalizers(nn.Sequential(model) if rank else model):  # around it or inside
        for step in range(2):
            model(batch(step, rank))
    taken = equalizer_state_dict(model.module)
    model(batch(2, rank)).sum().backward()
    kept = equalizer_state_dict(model.module)
    assert all(torch.equal(kept[name], exponent) for name, exponent in taken.items())
    torch.save(taken, folder / f"rank{rank}.pt")


def test_equalizers_are_collected_over_all_ranks(tmp_path: Path):
    run_on_ranks([collect], 2, "cpu", tmp_path)
    alone = build()
    with collect_equalizers(alone):
        for step in range(2):
            for rank in range(2):
                alone(batch(step, rank))
    wanted = equalizer_state_dict(alone)
    assert wanted.keys() == {"0", "2"}
    for rank in range(2):
        taken = torch.load(tmp_path / f"rank{rank}.pt")
        assert all(torch.equal(taken[name], exponent) for name, exponent in wanted.items())
