"""Layers that read the same tensor, as q, k and v do and gate and up, equalise, rotate, round and save it once.

Who reads what is seen at run time, by the identity of the tensor: any model, whatever its names. A first forward finds the
groups. With an equalising recipe each layer takes factors of its own in it, and after the step the group has one vector of
factors over all its weights (docs/numerics.md, section 2)::

    first step         q(x) k(x) v(x)    each rounds x with its own d; they form a group
    from the next on   q(x)              rounds x with the d of the group
                       k(x) v(x)         take what q rounded
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .config import HaloConfig
from .functional import RoundedInput, round_input, round_input_columns
from .operands import makes_both, takes_input_columns
from .products import autocast_dtype
from .quantize import Equalizer, exponents_of_amax
from .weight_cache import optimizer_steps


class Layer(Protocol):
    """What is used of a HaloLinear."""

    config: HaloConfig
    weight: Tensor
    out_features: int
    equalizer_exponent: Tensor
    equalizer_taken: bool
    training: bool
    input_group: InputGroup | None


class InputGroup:
    """Layers that read the same tensor in their first forward.

    A copy or a pickle has the copied layers as members: each of them adds itself.
    """

    def __init__(
        self,
        settled: bool = False,
        in_step: int | None = None,
        amax: tuple[Tensor, Tensor] | None = None,
        exponent: Tensor | None = None,
    ) -> None:
        self.members: weakref.WeakSet[Layer] = weakref.WeakSet()
        self.settled = settled
        """Complete, and its members have the same factors."""
        self._in_step = in_step
        """optimizer_steps() at the first forward, if that may have a backward."""
        self._amax = amax
        """column_amax of X and that of the weights of all members, [K] each, until it is settled."""
        self.exponent = exponent
        """log2 d of a settled group, for compiled code: where members round the same tensor with the same factors, the compiler
        sees that it is done already."""

    def record(self, x_amax: Tensor, w_amax: Tensor) -> None:
        """What a member takes its own factors from."""
        self._amax = (x_amax, w_amax if self._amax is None else torch.maximum(self._amax[1], w_amax))

    def settle_after_its_step(self) -> None:
        """Settles when no backward is left that a recomputation could be part of: it must do what its forward did."""
        if (
            not self.settled
            and self._in_step != optimizer_steps()
            and torch._C._current_graph_task_id() == -1
        ):
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Gives the members the factors of the group and admits no more; again does nothing."""
        if not self.settled and self._amax is not None and len(self.members) > 1:
            exponent = exponents_of_amax(*self._amax)
            for member in self.members:
                member.equalizer_exponent.copy_(exponent)
                self.exponent = member.equalizer_exponent
        self.settled, self._amax = True, None

    def dissolve(self) -> None:
        """Members keep the factors they have and round their inputs themselves, or meet again where they take new ones."""
        for member in list(self.members):
            member.input_group = None
        self.members.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return InputGroup, (self.settled, self._in_step, self._amax, self.exponent)


class JointFactors:
    """Layers that have the same one of these take their factors together, one d over all their weights."""


@dataclasses.dataclass
class _Read:
    """A tensor that was read, and by whom."""

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]
    group: InputGroup
    rounded: RoundedInput | None = None
    readers: int = 0


class SharedInputs:
    """The tensors that layers of one model have read, rounded, while others of the group are to come.

    What was rounded is used again only for the same tensor object, not written to since, under the same autograd and
    autocast modes; writing through ``x.data`` is not seen, as autograd does not see it. It is forgotten with the last
    reader or with the tensor. A copy or a pickle starts empty.
    """

    def __init__(self) -> None:
        self._reads: dict[int, _Read] = {}
        """By the id of the tensor."""

    def meet(self, layer: Layer, x: Tensor) -> None:
        """Before the layer takes or uses its factors: finds its group in its first forward, settles it later."""
        if layer.input_group is not None:
            if layer.equalizer_taken or not layer.config.equalize:
                layer.input_group.settle_after_its_step()
        elif not layer.equalizer_taken:
            read = self._find(x, layer.config)
            if read is None or read.group.settled:
                # In training mode a forward without gradients may be one that backward repeats with them.
                has_backward = torch.is_grad_enabled() or layer.training
                group = InputGroup(in_step=optimizer_steps() if has_backward else None)
                read = self._remember(x, layer.config, group)
            layer.input_group = read.group
            read.group.members.add(layer)

    def rounded(self, layer: Layer, x: Tensor, equalizer: Equalizer | None) -> RoundedInput | None:
        """x rounded for all layers of the group, or None: the layer rounds it itself."""
        group = layer.input_group
        if group is None or (layer.config.equalize and not group.settled):
            return None
        if group.settled and len(group.members) == 1:
            return None
        read = self._find(x, layer.config)
        if read is None or read.group is not group:
            read = self._remember(x, layer.config, group)
        rounded = read.rounded or round_input(x, layer.config, equalizer)
        if makes_both(x, layer.weight) and takes_input_columns(x, layer.out_features, layer.config):
            if rounded.columns is None:
                rounded = round_input_columns(x, rounded, layer.config)
            found = rounded
        else:
            found = rounded._replace(columns=None)
        read.rounded = rounded
        read.readers += 1
        if group.settled and read.readers == len(group.members):
            del self._reads[id(x)]
        return found

    def _find(self, x: Tensor, config: HaloConfig) -> _Read | None:
        read = self._reads.get(id(x))
        return read if read is not None and read.x() is x and read.state == _state(x, config) else None

    def _remember(self, x: Tensor, config: HaloConfig, group: InputGroup) -> _Read:
        this, key = weakref.ref(self), id(x)

        def forget(x: weakref.ref[Tensor]) -> None:
            reads = {} if (inputs := this()) is None else inputs._reads
            if key in reads and reads[key].x is x:
                del reads[key]

        read = self._reads[key] = _Read(weakref.ref(x, forget), _state(x, config), group)
        return read

    def __reduce__(self) -> tuple[type[SharedInputs], tuple[()]]:
        return SharedInputs, ()


def _state(x: Tensor, config: HaloConfig) -> tuple[Any, ...]:
    """What rounding x depends on besides its values and the group, and what the graph behind it belongs to."""
    # Each region of selective checkpointing has a mode of its own, and recomputing it must find the same operators.
    mode = _get_current_dispatch_mode()
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        autocast_dtype(x),
        (config.format, config.scaling, config.rotate_k, config.requantize_w_dgrad, config.equalize),
        None if mode is None else weakref.ref(mode),
        torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None,
    )


def group_by_factors(layers: dict[Layer, tuple[Any, ...]]) -> None:
    """Puts layers into settled groups by what they and their factors have in common, as given; for restored factors."""
    groups: dict[tuple[Any, ...], InputGroup] = {}
    for layer, common in layers.items():
        layer.input_group = groups.setdefault(common, InputGroup(settled=True))
        layer.input_group.exponent = layer.equalizer_exponent
        layer.input_group.members.add(layer)
