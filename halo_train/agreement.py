"""What FSDP2's ranks tell each other through the store of the process group: a collective would wait without a word for one that has
another model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from .config import HaloConfig

AGREEMENT_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait in fully_shard for one that has not come to the same layer; NCCL's own timeout is as long."""

PATIENCE = timedelta(seconds=30)
"""After which they tell what they are waiting for."""


class Conversion:
    """What one call of ``convert_to_halo_training`` has converted: FSDP2's ranks compare it when its first layer is sharded."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.compared = False


class Layer(Protocol):
    """What is used of a HaloLinear."""

    config: HaloConfig
    out_features: int
    in_features: int
    fqn: str
    conversion: Conversion | None
    to_meet: int

    @property
    def joint(self) -> object | None: ...


def describe(layer: Layer) -> str:
    """A layer as ranks compare it: what decides which collectives they call, and with what."""
    fused = "" if layer.joint is None else " fused"
    return f"{layer.fqn or 'HaloLinear'} {layer.out_features}x{layer.in_features} {layer.config.name}{fused}"


def meet(layer: Layer, weight: Any) -> None:
    """Before the first gather of the whole weight of a layer: tells which ranks have not come to it, where the gather would wait without a word.

    Raises:
        RuntimeError: after :data:`AGREEMENT_TIMEOUT`.
    """
    number, layer.to_meet = layer.to_meet, 0
    if not number:
        return
    ranks = weight.device_mesh.mesh.flatten().tolist()
    store, key = dist.distributed_c10d._get_default_store(), f"{_key(ranks, number)}/whole"
    store.set(f"{key}/{dist.get_rank()}", "")
    task = f"read the whole weight of {layer.fqn}; QuantMetrics, like everything that reads weights, must be on every rank"
    if not _wait_for(store, {r: f"{key}/{r}" for r in ranks}, AGREEMENT_TIMEOUT, task):
        raise RuntimeError(f"not all of the ranks {ranks} came within {AGREEMENT_TIMEOUT} to {task}")


def _key(ranks: Sequence[int], number: int) -> str:
    return f"halo_train/{'-'.join(map(str, ranks))}/{number}"


def check_agreement(layer: Layer, weight: Any) -> int:
    """Compares this layer between the ranks of its mesh through the store: a collective would hang if one of them has it not.

    Each rank writes what it is about to shard, and of the first layer of a conversion what else was converted: a rank that has
    fewer layers would not come to the last. The first reads all and writes the verdict for all.

    Returns:
        The number of the layer among those that these ranks have sharded; 0 if there is nobody to compare with.
    """
    ranks = weight.device_mesh.mesh.flatten().tolist()
    if len(ranks) == 1 or dist.get_backend() == "fake":
        return 0
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    _sharded_so_far[tuple(ranks)] += 1
    number = _sharded_so_far[tuple(ranks)]
    key = _key(ranks, number)
    lines = [f"{describe(layer)} as number {number}"]
    if layer.conversion is not None and not layer.conversion.compared:
        lines += layer.conversion.layers
        layer.conversion.compared = True
    store.set(f"{key}/{rank}", "\n".join(lines))
    task = f"shard {lines[0]}; have they converted the model?"
    if rank == ranks[0]:
        _wait_for(store, {r: f"{key}/{r}" for r in ranks}, AGREEMENT_TIMEOUT, task)
        found = {
            r: store.get(f"{key}/{r}").decode().split("\n") for r in ranks if store.check([f"{key}/{r}"])
        }
        store.set(f"{key}/verdict", _differences(found) if len(found) == len(ranks) else _who_came(found))
    if _wait_for(store, {ranks[0]: f"{key}/verdict"}, 2 * AGREEMENT_TIMEOUT, task):
        verdict = store.get(f"{key}/verdict").decode()
    else:
        verdict = _who_came({rank: lines})
    if verdict:
        raise ValueError(
            f"fully_shard: all ranks must have converted the same layers with the same recipe; the ranks {ranks} differ, {verdict}; call "
            "convert_to_halo_training with the same arguments on every rank, before fully_shard, and apart for what only some ranks have"
        )
    return number


def _differences(found: dict[int, list[str]]) -> str:
    """What not all ranks have, of each at most three layers; empty if they all have the same."""
    common = set.intersection(*map(set, found.values()))
    own = {rank: [line for line in lines if line not in common] for rank, lines in found.items()}
    if not any(own.values()):
        return ""
    return "; ".join(
        f"rank {rank}: {', '.join(lines[:3]) or 'nothing else'}{', ...' if len(lines) > 3 else ''}"
        for rank, lines in own.items()
    )


def _who_came(found: dict[int, list[str]]) -> str:
    came = "; ".join(f"rank {rank}: {lines[0]}" for rank, lines in found.items())
    return f"{came}; a rank that is not named did not come to it within {AGREEMENT_TIMEOUT}"


def _wait_for(store: Any, keys: dict[int, str], timeout: timedelta, task: str) -> bool:
    """Whether the keys, which the ranks write, are there in time."""
    if timeout > PATIENCE and not _are_there(store, keys.values(), PATIENCE):
        missing = [rank for rank, key in keys.items() if not store.check([key])]
        warnings.warn(f"waiting up to {timeout} for the ranks {missing} to {task}", stacklevel=3)
    return _are_there(store, keys.values(), timeout)


def _are_there(store: Any, keys: Iterable[str], timeout: timedelta) -> bool:
    try:
        store.wait(list(keys), timeout)
    except RuntimeError:
        return False
    return True


_sharded_so_far: Counter[tuple[int, ...]] = Counter()
"""Layers sharded over a set of ranks; part of the key under which they compare notes."""
