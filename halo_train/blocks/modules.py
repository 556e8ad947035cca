"""The parts of a transformer block that run fused: a norm whose readers are known, and a gated MLP.

A module keeps its parameters, children and names; its class becomes a subclass of what it was (:func:`become`), whose forward
falls back to the original one. Where a norm feeds layers that all take rounded inputs, it hands them no tensor but what they
asked for::

    norm(x) -> Projected      q, k and v, computed together; each layer takes its own
    norm(x) -> NormedInput    x and the norm, for a gated MLP
    norm(x) -> Tensor         as it was, where anything in this forward wants to see one: hooks, adapters, another dtype

What is handed on is no tensor, so that nothing can read values that were not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from ..config import Recompute
from ..fsdp import GatheredWeight
from ..fused import NormedInput, Projected, halo_gated_mlp, halo_projections
from ..fused.functions import Layer
from ..fused.inputs import column_features
from ..fused.norms import Norm
from ..gemm import MULTIPLE
from ..linear import HaloLinear, take_equalizers
from ..ops.fused_reference import ACTIVATIONS
from ..products import autocast_dtype
from ..quantize import Equalizer, Quantized, RoundedWeight


class Reader(NamedTuple):
    """What reads a norm's output: a module that only hands it to its linear layers, or a :class:`HaloGatedMLP`."""

    module: nn.Module
    layers: tuple[str, ...]
    """Names of the layers in the module; none for a HaloGatedMLP."""


class NormFusion(NamedTuple):
    """How a :class:`HaloNorm` runs."""

    readers: tuple[Reader, ...]
    """Everything that reads the output."""
    eps_name: str
    """Attribute that holds eps."""
    center: bool
    """LayerNorm; else RMSNorm."""
    unit_offset: bool
    """The gain is 1 + weight."""


class FusedModule(nn.Module):
    """Comes before the class that a module had: rounds what that writes, for the layers that read it."""

    kind: type[FusedModule]
    original: type[nn.Module]
    own_state: tuple[str, ...]
    """Attributes that the original class has not."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.kind, self.original), self.__dict__


class MLPFusion(NamedTuple):
    """How a :class:`HaloGatedMLP` runs."""

    readers: tuple[str, ...]
    """Names of the layers of gate and of up, or of the one that computes both, gate first."""
    down: str
    """Name of the layer that reads act(gate) * up."""
    activation: str
    """A key of :data:`halo_train.ops.fused_reference.ACTIVATIONS`."""


class HaloGatedMLP(FusedModule):
    """down(act(gate(x)) * up(x)) as one autograd function, as long as its layers allow it."""

    own_state = ("fusion",)
    fusion: MLPFusion

    def forward(self, x: Tensor | NormedInput) -> Tensor:
        """x [..., K], or what a :class:`HaloNorm` hands on, -> [..., N]."""
        norm = values = None
        if isinstance(x, NormedInput):
            norm, values, x = x.norm, x.values, x.x
        else:
            self.take_equalizers(x)
            if not self.can_fuse(x):
                return super().forward(x)
        first, down = self.readers()[0], self.down()
        equalizer, down_equalizer = first.factors(), down.factors()
        operands = [layer.operands(equalizer) for layer in self.readers()]
        if has_operand_hooks((*self.readers(), down)):
            run = partial(self._in_sight, x, norm, values, operands, equalizer)
            y: Tensor = (
                checkpoint(run, use_reentrant=False)
                if first.running_config.recompute is Recompute.MLP
                else run()
            )
            return y
        gate, up = operands if len(operands) == 2 else _halves(operands[0])
        return halo_gated_mlp(
            x,
            gate,
            up,
            down.operands(down_equalizer),
            activation=self.fusion.activation,
            config=first.running_config,
            equalizer=equalizer,
            down_equalizer=down_equalizer,
            norm=norm,
        )

    def _in_sight(
        self,
        x: Tensor,
        norm: Norm | None,
        values: Tensor | None,
        operands: list[Layer],
        equalizer: Equalizer | None,
    ) -> Tensor:
        """:meth:`forward` with act(gate) up as a tensor, for operand hooks, which down reads by its rows as without them."""
        readers = self.readers()
        config = readers[0].running_config
        outputs = halo_projections(x, operands, config=config, equalizer=equalizer, norm=norm)
        show_operands(readers, x if values is None else values, outputs, norm)
        halves = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
        h: Tensor = _GatedFunction.apply(*halves, _ACTIVATIONS[self.fusion.activation])
        down = self.down()
        factors = down.factors()
        outputs = halo_projections(h, [down.operands(factors)], config=config, equalizer=factors)
        show_operands((down,), h, outputs, None)
        return outputs[0]

    def readers(self) -> list[Any]:
        """The layers that read x: HaloLinear, unless somebody put something else there."""
        return [getattr(self, name) for name in self.fusion.readers]

    def down(self) -> Any:
        """The layer that reads act(gate) * up."""
        return getattr(self, self.fusion.down)

    def can_fuse(self, x: Tensor) -> bool:
        """Whether nothing in this forward needs the layers themselves to be called."""
        readers, down = self.readers(), self.down()
        return (
            can_fuse(readers, x)
            and is_usable(down)
            and down.running_config == readers[0].running_config
            and all(layer.bias is None for layer in readers)
            and (len(readers) == 2 or type(readers[0].weight) is nn.Parameter)
        )

    def take_equalizers(self, x: Tensor) -> None:
        """Takes factors that are missing from the first batch: from x, and for down from what the others make of it."""
        readers, down = self.readers(), self.down()
        if any(lacks_equalizer(layer) for layer in readers):
            take_jointly(readers, x)
        ready = all(isinstance(layer, HaloLinear) and not lacks_equalizer(layer) for layer in readers)
        if ready and lacks_equalizer(down):
            with torch.no_grad(), _outside_modes():
                # Not by calling the modules, whose hooks are there for other calls.
                outputs = [layer.multiply(x) for layer in readers]
                gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
                take_equalizers((down,), ACTIVATIONS[self.fusion.activation](gate)[0] * up)

    def lacks_equalizers(self) -> bool:
        """Whether some are still to be taken."""
        return any(lacks_equalizer(layer) for layer in (*self.readers(), self.down()))


def _halves(layer: Layer) -> tuple[Layer, Layer]:
    """The layers that compute the first and the second half of what ``layer`` computes."""
    gate, up = layer.weight.chunk(2)
    if layer.rounded is None:
        return Layer(gate), Layer(up)
    # Only its rows: the scales of columns are those of both halves, and a weight that is not kept has them apart.
    (data, scale), n = layer.rounded.rows, gate.shape[0]
    rows = Quantized(data[:n], scale[:n]), Quantized(data[n:], scale[n:])
    return Layer(gate, None, RoundedWeight(rows[0], None)), Layer(up, None, RoundedWeight(rows[1], None))


class HaloNorm(FusedModule):
    """A norm that hands on its output in 8 bits."""

    own_state = ("fusion",)
    fusion: NormFusion
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor | Projected | NormedInput:
        """x [..., K] -> its norm, in one of the forms at the top of this file."""
        mlp = self.fusion.readers[0].module
        if isinstance(mlp, HaloGatedMLP):
            if mlp.lacks_equalizers():
                with torch.no_grad():
                    mlp.take_equalizers(super().forward(x))
            if not (self._hands_on(x) and mlp.can_fuse(x)):
                return super().forward(x)
            watched = has_operand_hooks((*mlp.readers(), mlp.down()))
            return NormedInput(x, self._as_norm(), self._values(x) if watched else None)
        layers = [getattr(reader.module, name) for reader in self.fusion.readers for name in reader.layers]
        if any(lacks_equalizer(layer) for layer in layers):
            with torch.no_grad():
                take_jointly(layers, super().forward(x))
        if not (self._hands_on(x) and can_fuse(layers, x)):
            return super().forward(x)
        first, equalizer = layers[0], layers[0].factors()
        outputs = halo_projections(
            x,
            [layer.operands(equalizer) for layer in layers],
            config=first.running_config,
            equalizer=equalizer,
            norm=self._as_norm(),
        )
        if has_operand_hooks(layers):
            show_operands(layers, self._values(x), outputs, self._as_norm())
        return Projected(x.shape, tuple(layers), outputs)

    def _as_norm(self) -> Norm:
        fusion = self.fusion
        bias, eps = getattr(self, "bias", None), getattr(self, fusion.eps_name)
        return Norm(self.weight, bias, eps, fusion.center, fusion.unit_offset)

    def _values(self, x: Tensor) -> Tensor:
        """What the layers read, for hooks only."""
        fusion, k = self.fusion, x.shape[-1]
        needs_dy = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        with torch.no_grad(), _outside_modes():
            if fusion.center or fusion.unit_offset or self.weight.dtype != x.dtype:
                values: Tensor = super().forward(x)
            else:
                # One kernel where the classes of transformers have seven; as the fused norm it rounds once.
                values = F.rms_norm(x, (k,), self.weight, getattr(self, fusion.eps_name)).to(x.dtype)
            return values.requires_grad_(needs_dy)

    def _hands_on(self, x: Tensor) -> bool:
        """Whether nothing between the norm and the layers wants to see a tensor, and that would have the dtype of x."""
        same_dtype = autocast_dtype(x) is not None or self.fusion.unit_offset or self.weight.dtype == x.dtype
        return (
            same_dtype
            and x.dim() > 0
            and x.shape[-1] % MULTIPLE == 0
            and type(self.weight) is nn.Parameter
            and not any(is_watched(module) for module in (self, *(r.module for r in self.fusion.readers)))
        )


def become(module: nn.Module, kind: type[FusedModule], **attributes: Any) -> None:
    """Gives a module the class ``kind`` before its own, and its attributes."""
    module.__dict__.update(attributes)
    module.__class__ = _class_of(kind, type(module))


def restore(module: FusedModule) -> None:
    """Makes a module what it was before :func:`become`."""
    for name in module.own_state:
        del module.__dict__[name]
    module.__class__ = module.original  # type: ignore[assignment]


_classes: dict[tuple[type, type], type[FusedModule]] = {}


def _class_of(kind: type[FusedModule], original: type[nn.Module]) -> type[FusedModule]:
    if (kind, original) not in _classes:
        members = {"kind": kind, "original": original, "__doc__": kind.__doc__}
        name = f"{kind.__name__}Of{original.__name__}"
        _classes[kind, original] = type(name, (kind, original), members)
    return _classes[kind, original]


def _new(kind: type[FusedModule], original: type[nn.Module]) -> FusedModule:
    cls = _class_of(kind, original)
    return cls.__new__(cls)


def lacks_equalizer(layer: Any) -> bool:
    """Whether the layer takes its factors from the next batch that it sees."""
    return (
        isinstance(layer, HaloLinear)
        and layer.config.equalize
        and not layer.equalizer_taken
        and layer.input_amax is None  # else the layers are called one by one and see for themselves
    )


def take_jointly(layers: Sequence[Any], x: Tensor) -> None:
    """Takes one vector of factors for layers that read x, if they still are those of the block."""
    first = layers[0]
    alike = all(isinstance(layer, HaloLinear) and layer.joint is first.joint for layer in layers)
    if alike and first.joint is not None:
        with _outside_modes():
            take_equalizers(layers, x)


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_operand_hooks(layers: Sequence[HaloLinear]) -> bool:
    return any(layer.operand_hooks for layer in layers)


def show_operands(
    layers: Sequence[HaloLinear], x: Tensor, outputs: Sequence[Tensor], norm: Norm | None
) -> None:
    """Calls the operand hooks of layers that read x, the output of the norm if there is one."""
    features = column_features(norm, [layer.out_features for layer in layers])
    for layer, y in zip(layers, outputs, strict=True):
        layer.show_operands(x, y, features)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""As PyTorch computes those of :data:`halo_train.ops.fused_reference.ACTIVATIONS`, in the dtype of the input."""


class _GatedFunction(torch.autograd.Function):
    """h = act(gate) * up as a tensor that hooks can see; saves gate and up alone, as the fused MLP does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (dgate,) = torch.autograd.grad(activated, leaf, dh * up)
        return dgate, dh * activated.detach(), None


def is_usable(layer: Any) -> bool:
    """Whether the products of the layer can be computed without calling it."""
    return (
        isinstance(layer, HaloLinear)
        and not is_watched(layer)
        and type(layer.weight) in (nn.Parameter, GatheredWeight)
        and layer.equalizer_taken == layer.config.equalize
    )


def can_fuse(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether x can be rounded once for all layers, and they need not be called."""
    if not all(is_usable(layer) for layer in layers) or type(x) is not Tensor:
        return False
    first, dtype = layers[0], autocast_dtype(x)
    return (
        x.is_floating_point()
        and x.numel() > 0
        and x.shape[-1] == first.in_features
        and all(layer.running_config == first.running_config for layer in layers)
        and (not first.config.equalize or first.joint is not None)
        and all(layer.joint is first.joint for layer in layers)
        and (dtype is not None or all(layer.weight.dtype == x.dtype for layer in layers))
    )


def _outside_modes() -> AbstractContextManager[Any]:
    # Selective checkpointing is a mode that would keep what is computed here for the recompute, which does not compute it.
    return nullcontext() if torch.compiler.is_compiling() else _disable_current_modes()
