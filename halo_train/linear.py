"""HaloLinear: nn.Linear with its three products in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .config import Format, HaloConfig, resolve_recipe
from .functional import halo_linear, quantize_weight
from .quantize import Equalizer, Quantized, equalizer_exponents
from .weight_cache import WeightCache

_OWN_STATE = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "config",
    "equalizer_taken",
    "_weight_cache",
}
"""What from_linear and to_linear do not carry over as it is; hooks and everything else a user attached go along."""


class HaloLinear(nn.Linear):
    """y = x W^T + b, with fprop, dgrad and wgrad as the recipe says. Same parameters and ``state_dict`` as nn.Linear.

    With an equalising recipe the factors d are taken from the first batch that the layer sees and kept; see
    :meth:`reset_equalizer` and :func:`equalizer_state_dict`.

    Args:
        recipe: a recipe name or a HaloConfig; the other arguments are those of nn.Linear.
    """

    equalizer_exponent: Tensor
    """log2 d, [in_features] int8: an integer dtype survives model.half() and model.to(dtype)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | HaloConfig = "fp8",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = resolve_recipe(recipe)
        self.equalizer_taken = False
        self._weight_cache = WeightCache()
        zeros = torch.zeros(in_features, dtype=torch.int8, device=device)
        self.register_buffer("equalizer_exponent", zeros, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]; see :func:`halo_train.functional.halo_linear`."""
        if self.config.equalize and not self.equalizer_taken:
            self._take_equalizer(x)
        equalizer = Equalizer.of_exponents(self.equalizer_exponent) if self.equalizer_taken else None
        return halo_linear(
            x,
            self.weight,
            self.bias,
            config=self.config,
            equalizer=equalizer,
            quantized_weight=self._kept_weight(equalizer),
        )

    def equalizer(self) -> Tensor | None:
        """d [in_features] float32, or None while it is all ones."""
        return Equalizer.of_exponents(self.equalizer_exponent).d if self.equalizer_taken else None

    def reset_equalizer(self) -> None:
        """Takes d again from the next batch."""
        self.equalizer_taken = False

    def _kept_weight(self, equalizer: Equalizer | None) -> Quantized | None:
        """The rounded weight of an earlier micro-batch, if it still is that of this one."""
        if torch.compiler.is_compiling() or self.config.format is Format.HIGH_PRECISION:
            return None
        return self._weight_cache.get(
            self.weight,
            (self.config, self.equalizer_taken),
            (self.equalizer_exponent,),
            self.training,
            lambda: quantize_weight(self.weight, None if equalizer is None else equalizer.d, self.config),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HaloLinear:
        self._weight_cache.clear()  # it would stay behind on the old device
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def _take_equalizer(self, x: Tensor) -> None:
        usable = x.is_floating_point() and x.element_size() >= 2 and x.shape[-1] == self.in_features
        if not usable or x.numel() == 0 or x.is_meta:  # halo_linear says what is wrong
            return
        self.equalizer_exponent.copy_(equalizer_exponents(x.reshape(-1, self.in_features), self.weight))
        self.equalizer_taken = True

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | HaloConfig = "fp8") -> HaloLinear:
        """A HaloLinear that shares the parameters, the hooks and the training flag of ``linear``."""
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", recipe=recipe
        )
        new.equalizer_exponent = torch.zeros(
            linear.in_features, dtype=torch.int8, device=linear.weight.device
        )
        _share_state(linear, new)
        return new

    def to_linear(self) -> nn.Linear:
        """An nn.Linear that shares the parameters; the inverse of :meth:`from_linear`."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        _share_state(self, new)
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.config.name}"


def halo_linears(model: nn.Module) -> Iterator[tuple[str, HaloLinear]]:
    """(name, layer) of every HaloLinear in ``model``, each layer once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, HaloLinear))


def equalizer_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """log2 d by layer name, [in_features] int8, of the layers that have taken it. Save it beside the weights."""
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
    for name, layer in layers.items():
        layer.equalizer_taken = name in state
        if name in state:
            layer.equalizer_exponent.copy_(state[name])


def _share_state(source: nn.Linear, target: nn.Linear) -> None:
    target.weight, target.bias = source.weight, source.bias
    target.__dict__.update({key: value for key, value in source.__dict__.items() if key not in _OWN_STATE})
