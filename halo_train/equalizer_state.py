"""The equalisation factors of a model's layers: taken from several batches, saved beside its weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .fsdp import GatheredWeight, agreed_amax, regather, shards_amax
from .linear import HaloLinear, halo_linears
from .quantize import column_amax, exponents_of_amax
from .shared_input import group_by_factors


@contextmanager
def collect_equalizers(model: nn.Module) -> Iterator[None]:
    """Has the layers that have no equalisation factors yet take them from all batches that they see inside, when it ends::

        with halo_train.collect_equalizers(model):  # before the first step
            for batch in first_micro_batches:
                model(batch)

    Inside there are no gradients, compiled modules run eager, and those layers round without factors and run one by one.
    The factors depend on the largest magnitude in each column alone: not on how the rows are shared out over batches and, under
    FSDP2 or DDP, ranks, of which each must call this and the model equally often; to DDP that is a ``model`` with it inside or around it.
    One all-reduce then serves all layers of a mesh or process group. Layers that saw nothing, on any rank, take theirs from their next
    batch. After an error inside no layer has taken any.

    Call ``model.eval()`` before where dropout should not decide, and ``model.train()`` after.
    """
    layers = _without_factors(model)
    for layer in layers:
        layer.equalizer_taken = False
        regather(layer, _sharded_weight(layer))
        shape, device = (layer.in_features,), layer.equalizer_exponent.device
        layer.input_amax = torch.full(shape, -1.0, device=device)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
            _take_collected(layers, _replicas(model))
    finally:
        for layer in layers:
            layer.input_amax = None


def _without_factors(model: nn.Module) -> list[HaloLinear]:
    """Layers that have still to take them, and those that take theirs together with one of them."""
    layers = [layer for _, layer in halo_linears(model) if layer.config.equalize]
    missing = {layer for layer in layers if not layer.equalizer_taken and layer.input_amax is None}
    joint = {layer.joint for layer in missing} - {None}
    return [layer for layer in layers if layer in missing or layer.joint in joint]


def _replicas(model: nn.Module) -> dict[HaloLinear, dist.ProcessGroup]:
    """The ranks that have a copy of a layer, of those inside a DistributedDataParallel."""
    wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return {layer: m.process_group for m in wrappers for _, layer in halo_linears(m)}


def _take_collected(layers: Sequence[HaloLinear], replicas: Mapping[HaloLinear, dist.ProcessGroup]) -> None:
    together: dict[object, list[HaloLinear]] = defaultdict(list)
    for layer in layers:
        together[layer.joint or layer].append(layer)
    by_ranks: dict[Any, list[list[HaloLinear]]] = defaultdict(list)
    for members in together.values():
        shard = _sharded_weight(members[0])
        by_ranks[replicas.get(members[0]) if shard is None else shard.device_mesh].append(members)
    for ranks, groups in by_ranks.items():
        found = [_column_amax_of(members) for members in groups]
        if ranks is not None:
            agreed = agreed_amax(torch.cat([amax.flatten() for amax in found]), ranks)
            parts = agreed.split([amax.numel() for amax in found])
            found = [part.view(2, -1) for part in parts]
        for members, (x_amax, w_amax) in zip(groups, found, strict=True):
            if x_amax[0] < 0:
                continue
            exponent = exponents_of_amax(x_amax, w_amax)
            for layer in members:
                layer.equalizer_exponent.copy_(exponent)
                layer.equalizer_taken = True
                regather(layer, _sharded_weight(layer))
                if layer.input_group is not None:
                    layer.input_group.record(x_amax, w_amax)
    for layer in layers:
        if layer.input_group is not None:
            layer.input_group.settle()


def _column_amax_of(members: Sequence[HaloLinear]) -> Tensor:
    """Of the inputs that layers have seen and, over all of them, of their weights as far as they are on this rank, [2, K]."""
    seen = [layer.input_amax for layer in members if layer.input_amax is not None]
    x_amax = torch.stack(seen).amax(0)
    if (shards := [_sharded_weight(layer) for layer in members])[0] is not None:
        w_amax = shards_amax(shards, x_amax.device)
    else:
        w_amax = torch.stack([column_amax(layer.weight) for layer in members]).amax(0)
    return torch.stack([x_amax, w_amax])


def _sharded_weight(layer: HaloLinear) -> Any:
    """The DTensor that FSDP2 keeps for the layer, or None."""
    return layer.__dict__.get("_sharded_weight")


def equalizer_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """log2 d by layer name, [in_features] int8, of the layers that have taken it. Save it beside the weights.

    Layers that share inputs get the factors of their group now, if they have not yet (:mod:`halo_train.shared_input`).
    """
    for _, layer in halo_linears(model):
        if layer.input_group is not None:
            layer.input_group.settle()  # what the run goes on with
    return {name: m.equalizer_exponent.clone() for name, m in halo_linears(model) if m.equalizer_taken}


def load_equalizer_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores what :func:`equalizer_state_dict` returned; layers that it does not name take d from their next batch.

    Raises:
        ValueError: a name that is no HaloLinear of the model, or a vector of another length; nothing is changed then.
    """
    layers = dict(halo_linears(model))
    for name, exponent in state.items():
        if name not in layers:
            raise ValueError(
                f"equalizer state names {name!r}, which is no HaloLinear of this model; convert the model with the recipe "
                "that the state was saved with"
            )
        if exponent.shape != (layers[name].in_features,):
            raise ValueError(
                f"equalizer state of {name!r} must have shape ({layers[name].in_features},); got {tuple(exponent.shape)}"
            )
        if isinstance(layers[name].weight, GatheredWeight):
            raise ValueError(
                f"equalizer state of {name!r}: its weight is gathered by FSDP2, rounded with the factors it has; call reshard() on "
                "the model's FSDP modules first, or load the state before the first forward"
            )
    for name, layer in layers.items():
        layer.equalizer_taken = name in state
        layer.input_group = None
        if name in state:
            layer.equalizer_exponent.copy_(state[name])
    _check_joint_factors(layers, state)
    # Equal factors are those of a group; where not, layers of equal factors share if they should read the same tensor.
    group_by_factors(
        {
            layers[name]: (id(layers[name].shared_inputs), *exponent.tolist())
            for name, exponent in state.items()
            if layers[name].shared_inputs is not None
        }
    )


def _check_joint_factors(layers: Mapping[str, HaloLinear], state: Mapping[str, Tensor]) -> None:
    """Ends the fusion of layers that were given different factors."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.joint is not None:
            groups.setdefault(id(layer.joint), []).append(name)
    for names in groups.values():
        given = {tuple(state[name].tolist()) if name in state else None for name in names}
        if len(given) > 1:
            warnings.warn(
                f"equalizer state of {', '.join(names)}: they read the same input and could round it once, but the state, saved without "
                "convert_to_halo_training(fuse=True), has other factors for each; they run one by one. reset_equalizer() takes new ones",
                stacklevel=3,
            )
            for name in names:
                layers[name].joint = None
