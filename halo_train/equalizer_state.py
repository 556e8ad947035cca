"""The equalisation factors of a model's layers, to save beside its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from .fsdp import GatheredWeight
from .linear import HaloLinear, halo_linears
from .shared_input import group_by_factors


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
