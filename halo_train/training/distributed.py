"""One run on several processes: who they are, what only the first does, sums over them, FSDP2 around the model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .blocks import blocks
from .config import Config
from .errors import UserError
from .sharded_load import fill_shards

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; a run without torchrun is one process and needs no process group."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the body, then the others: they find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.several:
            distributed.barrier()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Over all processes, the same on each."""
        if not self.several:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)  # on the CPU, where gloo adds: no wait for the GPU
        distributed.all_reduce(total)
        return total.tolist()

    def union(self, values: dict[int, T]) -> dict[int, T]:
        """Of all processes, the same on each."""
        if not self.several:
            return values
        parts: list[dict[int, T]] = [{}] * self.world_size
        distributed.all_gather_object(parts, values)
        return {key: value for part in parts for key, value in part.items()}

    def share(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This process's part of ``batches`` and whether each counts: all get as many, the last repeated where one is missing.

        Sharded layers need every process in every forward.
        """
        iterator = iter(batches)
        while group := list(islice(iterator, self.world_size)):
            yield group[min(self.rank, len(group) - 1)], self.rank < len(group)


def launch(nproc: int, config: Config, arguments: Sequence[str]) -> NoReturn:
    """``halo-train`` with these arguments in ``nproc`` processes, in the place of this one: signals and exit code are torchrun's.

    Raises:
        UserError: settings of the run that so many processes cannot have, before torchrun buries the message.
    """
    require_several_possible(config, nproc)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "halo_train.cli", *arguments])


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """The process group of a run that torchrun started. Only the first process prints.

    Args:
        device: the kind of device; each process takes the GPU of its local rank.

    Raises:
        UserError: fewer GPUs than processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    chosen = device
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if chosen.index >= torch.cuda.device_count():
            raise UserError(
                f"--nproc must be at most the number of GPUs, {torch.cuda.device_count()}; got {os.environ['LOCAL_WORLD_SIZE']}"
            )
        torch.cuda.set_device(chosen)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        with ExitStack() as stack:
            if distributed.get_rank():
                sys.stdout = stack.enter_context(open(os.devnull, "w"))
                stack.callback(setattr, sys, "stdout", sys.__stdout__)
            yield Ranks(distributed.get_rank(), world_size, chosen)
    finally:
        distributed.destroy_process_group()


@contextmanager
def own_files(ranks: Ranks, folder: Path) -> Iterator[Path]:
    """Where this process writes the files that every process writes: the run's folder for the first, elsewhere for others."""
    if ranks.first:
        yield folder
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        with suppress(FileNotFoundError):
            shutil.copy(folder / "metrics.jsonl", elsewhere)  # what a resumed run goes on with
        yield Path(elsewhere)


def require_several_possible(config: Config, world_size: int) -> None:
    """
    Raises:
        UserError: settings that a run of so many processes cannot have.
    """
    if world_size == 1:
        return
    if config.train.grad_accum % world_size:
        raise UserError(
            f"train.grad_accum counts the micro-batches of all {world_size} processes together and must be a multiple of "
            f"{world_size}; got {config.train.grad_accum}; with the same value a run is the same on any number of GPUs"
        )
    if config.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer must be adamw with several processes; got {config.train.optimizer!r}"
        )


def shard(loss_of: nn.Module, model: nn.Module, ranks: Ranks, path: Path) -> None:
    """FSDP2 around each block of the model and around the loss, whose forward reads the output layer itself. Gradients are summed.

    Args:
        path: of the model; parameters on the meta device get their values from there.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for block in blocks(model, "a run of several processes"):
        fully_shard(block, mesh=mesh)
    fully_shard(loss_of, mesh=mesh)
    for module in loss_of.modules():
        if isinstance(module, FSDPModule):
            # Not averaged: a loss times three, against it, would be rounded to other bfloat16 gradients on three processes than on one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # for one, as gloo has no multiplied sum
    if any(parameter.is_meta for parameter in model.parameters()):
        fill_shards(model, path, ranks.device)
    # Equal weights, but other dropout on each process.
    torch.manual_seed(torch.initial_seed() + ranks.rank)


@contextmanager
def callable_in_parts(loss_of: nn.Module) -> Iterator[None]:
    """While active, the model inside may be called by itself: what FSDP2 gathers in the loss's forward is there."""
    if not isinstance(loss_of, FSDPModule):
        yield
        return
    loss_of.unshard()
    try:
        yield
    finally:
        loss_of.reshard()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first process, nothing on the others; every process must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A number that the processes may hold in parts, such as the norm of sharded gradients."""
    return value.full_tensor() if isinstance(value, DTensor) else value
