"""HaloLinear: nn.Linear with its three products in 8 bits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .agreement import Conversion, meet
from .config import Format, HaloConfig, resolve_recipe
from .fsdp import GatheredWeight, attach, check_whole, is_sharded, take_agreed_exponents
from .functional import halo_linear
from .fused import Projected
from .fused.functions import Layer
from .operands import round_weight
from .quantize import Equalizer, RoundedWeight, column_amax, exponents_of_amax
from .reuse import KeptEqualizer, keeping_stream
from .shared_input import InputGroup, JointFactors, SharedInputs
from .weight_cache import WeightCache

_OWN_STATE = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "config",
    "equalizer_taken",
    "_weight_cache",
    "_kept_equalizer",
    "_sharded_weight",
    "fqn",
    "conversion",
    "ranks_agree",
    "to_meet",
    "tied",
    "input_is_kept",
    "shared_inputs",
    "input_group",
    "joint",
    "input_amax",
    "operand_hooks",
}
"""What from_linear and to_linear do not carry over as it is; hooks and everything else a user attached go along."""


OperandHook = Callable[["HaloLinear", Tensor, Tensor, int], None]
"""(layer, x [..., in_features], y [..., out_features], what :func:`halo_train.operands.takes_input_columns` asks of its output features)."""


class HaloLinear(nn.Linear):
    """y = x W^T + b, with fprop, dgrad and wgrad as the recipe says. Same parameters and ``state_dict`` as nn.Linear.

    With an equalising recipe the factors d are taken from the first batch that the layer sees and kept; see :meth:`reset_equalizer`,
    :func:`halo_train.collect_equalizers` and :func:`halo_train.equalizer_state_dict`.

    Args:
        recipe: a recipe name or a HaloConfig; the other arguments are those of nn.Linear.
    """

    equalizer_exponent: Tensor
    """log2 d, [in_features] int8: an integer dtype survives model.half() and model.to(dtype)."""
    _buffers: dict[str, Tensor]  # type: ignore[assignment]
    """Read here where an attribute of an nn.Module, which costs the host half a microsecond, is asked for in every call."""
    fqn: str
    """Name in the model that it was converted in, for messages."""
    conversion: Conversion | None
    """What was converted with it."""
    ranks_agree: bool
    """Whether FSDP2's ranks have compared how they converted this layer."""
    to_meet: int
    """Number under which they meet before the first gather of the whole weight; 0: they need not, or have."""
    tied: bool
    """Whether an embedding has the same weight: FSDP2 then gathers it as it is."""
    input_is_kept: bool
    """Whether what computes its input keeps that for backward, as attention does: it is then rounded once more, not kept twice."""
    shared_inputs: SharedInputs | None
    """That of the model, if its layers share inputs."""
    input_group: InputGroup | None
    """The layers that this one shares its input with, once it has seen one."""
    joint: JointFactors | None
    """The same in layers of a block that read one input and take one d together (:mod:`halo_train.blocks.modules`)."""
    input_amax: Tensor | None
    """Inside :func:`halo_train.collect_equalizers`, while the factors are to be taken: column_amax of the inputs so far, [in_features]
    float32, -1 before the first."""
    operand_hooks: OrderedDict[int, OperandHook]
    """See :meth:`register_operand_hook`."""

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
        self.fqn = ""
        self.to_meet = 0
        self.ranks_agree = self.tied = self.input_is_kept = False
        self.conversion = self.shared_inputs = self.input_group = self.joint = self.input_amax = None
        self.operand_hooks = OrderedDict()
        self._weight_cache = WeightCache()
        self._kept_equalizer = KeptEqualizer()
        zeros = torch.zeros(in_features, dtype=torch.int8, device=device)
        self.register_buffer("equalizer_exponent", zeros, persistent=False)

    def forward(self, x: Tensor | Projected) -> Tensor:
        """x [..., in_features] -> [..., out_features]; see :func:`halo_train.functional.halo_linear`."""
        if isinstance(x, Projected):
            return x.of(self)
        y = self.multiply(x)
        if self.operand_hooks:
            self.show_operands(x, y, self.out_features)
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """:meth:`forward` of a tensor, of which nobody is told."""
        weight, config = self.weight, self.config
        gathered = isinstance(weight, GatheredWeight)
        if gathered:
            config = config.with_folded_dgrad
        shared = self.shared_inputs
        if shared is not None:
            if self._can_share(x):
                shared.meet(self, x)
            else:
                shared = None
        stream = self._keeping_stream()
        equalizer = self._prepare(x, weight, stream)
        # A rank without tokens has a gradient too, of zeros: FSDP2 reduces it with those of the others.
        empty = gathered and x.numel() == 0
        tokens = F.pad(x.reshape(-1, self.in_features), (0, 0, 0, 1)) if empty else x
        y = halo_linear(
            tokens,
            weight,
            self.bias,
            config=config.with_recomputed_inputs if self.input_is_kept else config,
            equalizer=equalizer,
            rounded_weight=self._rounded_weight(weight, equalizer, stream),
            rounded_input=None if shared is None else shared.rounded(self, x, equalizer),
        )
        return y[:0].reshape(*x.shape[:-1], self.out_features) if empty else y

    def prepare(self, x: Tensor) -> Equalizer | None:
        """:meth:`factors`, taken from x [..., in_features] if the layer has none yet: what every use of its operands begins with.

        Raises:
            ValueError: the weight is not whole.
        """
        return self._prepare(x, self.weight, self._keeping_stream())

    def _prepare(self, x: Tensor, weight: Tensor, stream: int | None) -> Equalizer | None:
        # A plain parameter to which nothing was attached needs no look; torch.compile, for which there is no stream, cannot tell.
        if not (
            (stream is not None and type(weight) is nn.Parameter and not weight.__dict__)
            or isinstance(weight, GatheredWeight)
            or torch.compiler.is_compiling()
        ):
            check_whole(self.fqn, weight)
        if not self.equalizer_taken and self.config.equalize:
            self._take_equalizer(x)
        return self._factors(stream)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 swaps the sharded and the gathered parameter through here, fully_shard first of all.
        sharded = name == "weight" and is_sharded(value)
        if sharded:
            self.__dict__["_sharded_weight"] = value  # not through nn.Module, which would register it
            attach(self, value)
            if self.input_group is not None:
                self.input_group.dissolve()
        if (sharded or isinstance(value, GatheredWeight)) and isinstance(value, nn.Parameter):
            self._parameters[name] = value  # as FSDP2 does where a module has no __setattr__: 5 us less
        else:
            super().__setattr__(name, value)

    def register_operand_hook(self, hook: OperandHook) -> RemovableHandle:
        """Calls ``hook`` in every forward, before the forward hooks; its weight is whole then.

        Unlike a forward hook it leaves a block fused (:mod:`halo_train.blocks`): x is computed for it where the layer reads
        what exists in 8 bits only, and requires a gradient where that does. A compiled region does not call it, unless it is compiled
        with it.
        """
        handle = RemovableHandle(self.operand_hooks)
        self.operand_hooks[handle.id] = hook
        return handle

    def show_operands(self, x: Tensor, y: Tensor, column_features: int) -> None:
        """Calls the operand hooks: for what computes y without calling the layer."""
        for hook in self.operand_hooks.values():
            hook(self, x, y, column_features)

    def equalizer(self) -> Tensor | None:
        """d [in_features] float32, or None while it is all ones."""
        factors = self.factors()
        return None if factors is None else factors.d

    def factors(self) -> Equalizer | None:
        """d and 1/d, or None while they are all ones."""
        return self._factors(self._keeping_stream())

    def _factors(self, stream: int | None) -> Equalizer | None:
        if not self.equalizer_taken:
            return None
        exponent = self._buffers["equalizer_exponent"]
        if stream is None and torch.compiler.is_compiling():
            group = self.input_group
            shared = None if group is None else group.exponent
            return Equalizer.of_exponents(exponent if shared is None else shared)
        return self._kept_equalizer.get(exponent, stream, sharded="_sharded_weight" in self.__dict__)

    def _keeping_stream(self) -> int | None:
        return keeping_stream(self._buffers["equalizer_exponent"])

    def operands(self, equalizer: Equalizer | None) -> Layer:
        """What :mod:`halo_train.fused` takes of this layer; equalizer: its :meth:`factors`."""
        weight = self.weight
        return Layer(weight, self.bias, self._rounded_weight(weight, equalizer, self._keeping_stream()))

    @property
    def running_config(self) -> HaloConfig:
        """The config that the products run with: ``config``; with a folded dgrad while FSDP2 has the weight gathered in 8 bits,
        of which no rank has more than the rotated rows."""
        return self.config.with_folded_dgrad if isinstance(self.weight, GatheredWeight) else self.config

    def whole_weight(self) -> Tensor:
        """The weight [N, K] itself, detached. Under FSDP2 every rank must call it: it is gathered in the dtype of the shards."""
        sharded = self.__dict__.get("_sharded_weight")
        if sharded is None:
            return self.weight.detach()
        meet(self, sharded)
        return sharded.detach().full_tensor().to(self.equalizer_exponent.device)

    def reset_equalizer(self) -> None:
        """Takes d again from the next batch. Layers that share their input with this one keep theirs and share no longer."""
        self.equalizer_taken = False
        if self.input_group is not None:
            self.input_group.dissolve()

    def _can_share(self, x: Tensor) -> bool:
        """Whether x may be rounded for other layers too; where not, the layer rounds it itself, to the same bits."""
        return (
            (self.joint is None or self.input_amax is None)
            and not torch.compiler.is_compiling()
            and type(x) is Tensor
            and not torch.is_inference_mode_enabled()
            and not x.is_inference()
            and x.numel() > 0
            and self._is_usable(x)
            and self.config.format is not Format.HIGH_PRECISION
            and type(self.weight) is nn.Parameter
            and "_sharded_weight" not in self.__dict__
        )

    def _is_usable(self, x: Tensor) -> bool:
        # Where it is not, halo_linear says what is wrong.
        fits = x.dim() > 0 and x.shape[-1] == self.in_features
        return x.is_floating_point() and x.element_size() >= 2 and fits and not x.is_meta

    def _rounded_weight(
        self, weight: Tensor, equalizer: Equalizer | None, stream: int | None
    ) -> RoundedWeight | None:
        """As FSDP2 gathered it, or as it was kept from an earlier micro-batch if it still is that of this one."""
        if isinstance(weight, GatheredWeight):
            return RoundedWeight(weight.quantized(), None)
        config = self.config
        if stream is None or config.format is Format.HIGH_PRECISION:
            return None
        return self._weight_cache.get(
            weight,
            (config, self.equalizer_taken),
            self._buffers["equalizer_exponent"],
            self.training,
            stream,
            lambda: round_weight(weight, None if equalizer is None else equalizer.d, config),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.input_group is not None:
            self.input_group.members.add(self)
            self._tell_group()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HaloLinear:
        self._weight_cache.clear()  # it would stay behind on the old device
        super()._apply(fn, recurse)
        self._tell_group()
        if is_sharded(self.weight):
            attach(self, self.weight)  # fn made a new shard
        return self

    def _tell_group(self) -> None:
        """Where the buffer is now."""
        if self.input_group is not None and self.input_group.exponent is not None:
            self.input_group.exponent = self.equalizer_exponent

    def _take_equalizer(self, x: Tensor) -> None:
        taken_from = take_equalizers((self,), x)
        if self.equalizer_taken:
            self.joint = None  # those of the others are not known here
        if taken_from is not None and self.input_group is not None:
            self.input_group.record(*taken_from)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: str | HaloConfig = "fp8") -> HaloLinear:
        """A HaloLinear that shares the parameters, the hooks and the training flag of ``linear``.

        Raises:
            ValueError: the weight is sharded already.
        """
        if is_sharded(linear.weight):
            raise ValueError(
                "HaloLinear: the weight must not be sharded yet; it is a DTensor with placements "
                f"{getattr(linear.weight, 'placements', '?')}; convert the model first, then call fully_shard"
            )
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", recipe=recipe
        )
        new.equalizer_exponent = torch.zeros(
            linear.in_features, dtype=torch.int8, device=linear.weight.device
        )
        _share_state(linear, new)
        return new

    def to_linear(self) -> nn.Linear:
        """An nn.Linear that shares the parameters; the inverse of :meth:`from_linear`.

        Raises:
            ValueError: FSDP2 has the weight, and would go on setting it on this layer.
        """
        if "_sharded_weight" in self.__dict__:
            raise ValueError(
                f"HaloLinear {self.fqn!r}: fully_shard has taken the layer over, so that it cannot be replaced by nn.Linear; get whole "
                "weights with get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), whose names and dtypes are "
                "those of nn.Linear, or revert() before fully_shard"
            )
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        _share_state(self, new)
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.config.name}"


def halo_linears(model: nn.Module) -> Iterator[tuple[str, HaloLinear]]:
    """(name, layer) of every HaloLinear in ``model``, each layer once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, HaloLinear))


@torch.no_grad()
def take_equalizers(layers: Sequence[HaloLinear], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gives layers that read x [..., K] one vector of factors: amax_k(W) is that over all their weights.

    Returns:
        column_amax of x and that of the weights, [K] each, if the factors were taken from x alone, and on one GPU.
    """
    first = layers[0]
    if not first._is_usable(x):
        return None
    tokens = x.reshape(-1, first.in_features)
    if first.input_amax is not None:
        if x.numel():
            torch.maximum(first.input_amax, column_amax(tokens), out=first.input_amax)
        return None
    if "_sharded_weight" in first.__dict__:
        take_agreed_exponents(layers, [layer.__dict__["_sharded_weight"] for layer in layers], tokens)
        return None
    if not x.numel():
        return None
    x_amax, w_amax = column_amax(tokens), column_amax(first.weight)
    for layer in layers[1:]:
        w_amax = torch.maximum(w_amax, column_amax(layer.weight))
    exponent = exponents_of_amax(x_amax, w_amax)
    for layer in layers:
        layer.equalizer_exponent.copy_(exponent)
        layer.equalizer_taken = True
    return x_amax, w_amax


def _share_state(source: nn.Linear, target: nn.Linear) -> None:
    target.weight, target.bias = source.weight, source.bias
    target.__dict__.update({key: value for key, value in source.__dict__.items() if key not in _OWN_STATE})
