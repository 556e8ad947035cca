"""DistributedDataParallel around a converted model: two gloo processes on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halo_train import convert_to_halo_training, equalizer_state_dict

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


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    for step in range(2):
        model.zero_grad()
        model(batch(step, rank)).square().mean().backward()
    result = {
        "grads": [p.grad for p in model.parameters()],
        "equalizer": equalizer_state_dict(model.module),
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_the_mean_over_ranks_with_one_equalizer(tmp_path: Path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
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
