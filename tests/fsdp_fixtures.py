"""What the tests of FSDP2 share: checks that every rank of a process group runs, and a small model.

A rank is forked from a process that has imported PyTorch, which takes longer than most checks; on GPUs it is spawned, because CUDA
cannot be forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from halo_train import HaloLinear, convert_to_halo_training, fsdp
from halo_train.linear import halo_linears
from halo_train.operands import pad_rows, quantize_weight

Check = Callable[[int, int, str, Path], None]
"""Of rank, world size, kind of device and a folder of all ranks."""

WIDTH = 48

multiprocessing.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "transformers.models.llama.modeling_llama",
        "halo_train",
    ]
)


def run_on_ranks(checks: list[Check], world: int, device: str, folder: Path) -> None:
    """Runs the checks in one process group of ``world`` ranks: gloo for "cpu", NCCL for "cuda"."""
    method = "spawn" if device == "cuda" else "forkserver"
    mp.start_processes(_rank, (checks, world, device, folder), nprocs=world, start_method=method)


def checks_of(module: str) -> list[Check]:
    """Its functions that are named check_..."""
    return [check for name, check in vars(sys.modules[module]).items() if name.startswith("check_")]


def _rank(rank: int, checks: list[Check], world: int, device: str, folder: Path) -> None:
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    if rank == 0:
        print(f"\n{time.perf_counter() - start:6.1f} s  process group of {world}", flush=True)
    for check in checks:
        start = time.perf_counter()
        try:
            check(rank, world, device, folder)
        except BaseException as error:
            raise AssertionError(
                f"{check.__name__} on rank {rank} of {world}:\n{traceback.format_exc()}"
            ) from error
        dist.barrier()
        if rank == 0:  # pytest -s shows it
            print(f"{time.perf_counter() - start:6.1f} s  {check.__name__}", flush=True)
    dist.destroy_process_group()


@contextlib.contextmanager
def raises(message: str) -> Iterator[None]:
    """The error on every rank."""
    text = ""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError) as error:
        text = str(error)
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert all(message in t for t in texts), texts


class Block(nn.Module):
    """Rows that 2, 3 and 4 ranks share evenly, unevenly, and too few for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 96, bias=False)
        self.odd = nn.Linear(96, 33)
        self.few = nn.Linear(33, 4)
        self.down = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.few(torch.relu(self.odd(self.up(self.norm(x))))))


def build(
    recipe: str = "fp8", dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block()).to(dtype)
    convert_to_halo_training(model, recipe=recipe, module_filter_fn=lambda *_: True)
    return model.to(device)


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    for block in model:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def batch(step: int, rank: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    x[:, rank] *= 50
    return x.to(device, dtype)


def whole_batch(step: int, world: int, device: str) -> Tensor:
    return torch.cat([batch(step, rank, device) for rank in range(world)])


def folding_dgrad(model: nn.Sequential) -> nn.Sequential:
    """As its layers run with weights that are gathered in 8 bits."""
    for _, layer in halo_linears(model):
        layer.config = layer.config.with_folded_dgrad
    return model


def alone(recipe: str, device: str, world: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The model on one rank, with the equalizers of everybody's first batch."""
    model = folding_dgrad(build(recipe, dtype, device))
    with torch.no_grad():
        model(whole_batch(0, world, device).to(dtype))
    return model


@contextlib.contextmanager
def weights_seen(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Copies of what the layers had for a weight in their forward."""
    seen: dict[str, Any] = {}

    def look(layer: HaloLinear, args: Any, output: Any) -> None:
        weight = layer.weight
        rounded = isinstance(weight, fsdp.GatheredWeight)
        seen[layer.fqn] = (
            tuple(t.clone() for t in pad_rows(weight.quantized())) if rounded else weight.detach().clone()
        )

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, HaloLinear)]
    yield seen
    for handle in handles:
        handle.remove()


def full(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def assert_gathered_bits(model: nn.Module, seen: dict[str, Any]) -> None:
    weights = full(model)
    for name, (data, scale) in seen.items():
        layer = model.get_submodule(name)
        expected = quantize_weight(weights[f"{name}.weight"], layer.equalizer(), layer.config)
        assert torch.equal(data.view(torch.uint8), expected.data.view(torch.uint8)), name
        assert torch.equal(scale, expected.scale), name
