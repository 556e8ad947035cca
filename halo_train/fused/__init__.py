"""What stands around the linear layers of a transformer block, fused with their rounding: docs/numerics.md, section 8.

::

    norm -> q, k, v      the norm writes its output once, in 8 bits, for all that read it
    norm -> gated MLP    the same; h = act(gate) up goes to 8 bits without having been in bfloat16, and backward writes the
                         gradients of gate and up in 8 bits only

Each is one autograd Function over the parameters of ordinary layers, which round and multiply as HaloLinear does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..config import Format, HaloConfig, Scaling
from ..gemm import MULTIPLE
from ..products import autocast_dtype, without_autocast
from ..quantize import Equalizer
from .functions import GatedMLPFunction, Layer, ProjectionsFunction, flatten
from .inputs import Arguments
from .norms import Norm


@dataclasses.dataclass(eq=False)
class NormedInput:
    """The input of a gated MLP of which the norm is still to be taken: what a norm hands on instead of a tensor."""

    x: Tensor
    """[..., K], before the norm."""
    norm: Norm
    values: Tensor | None = None
    """norm(x), detached, where an operand hook wants to see it."""

    @property
    def shape(self) -> torch.Size:
        """That of x."""
        return self.x.shape


@dataclasses.dataclass(eq=False)
class Projected:
    """What layers make of an input that exists in 8 bits only: handed to them in its place, each takes its own."""

    shape: torch.Size
    """Of the input."""
    layers: tuple[object, ...]
    outputs: tuple[Tensor, ...]

    def of(self, layer: object) -> Tensor:
        """The output of one of the layers.

        Raises:
            TypeError: it is none of them.
        """
        for known, output in zip(self.layers, self.outputs, strict=True):
            if known is layer:
                return output
        raise TypeError(
            f"{type(layer).__name__} was given an input that exists rounded for {len(self.layers)} other layers only; the model reads "
            "a norm's output in more places than its class says: convert_to_halo_training(fuse=False)"
        )


def halo_projections(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    config: HaloConfig,
    equalizer: Equalizer | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, ...]:
    """norm(x) W_i^T + bias_i for layers i that read the same input: it is rounded, transposed and saved once.

    Args:
        x: [..., K], not empty; with a norm K is a multiple of 16.
        layers: weights [N_i, K].
        config: see :func:`why_not_fused`.
        equalizer: one for all layers.
        norm: of x; None takes x as it is.

    Returns:
        [..., N_i] for each layer, in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: a config that is not fused; shapes or dtypes that do not fit.
    """
    out_dtype = _check("halo_projections", x, layers, config, norm)
    arguments = Arguments(config, out_dtype, None if norm is None else norm._replace(weight=None, bias=None))
    with without_autocast(x.device.type):
        outputs: tuple[Tensor, ...] = ProjectionsFunction.apply(
            arguments, *_input(x, norm, out_dtype), *(equalizer or (None, None)), *flatten(layers)
        )
    return outputs


def halo_gated_mlp(
    x: Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    *,
    activation: str,
    config: HaloConfig,
    equalizer: Equalizer | None = None,
    down_equalizer: Equalizer | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """(act(y Wg^T) * (y Wu^T)) Wd^T + bias with y = norm(x): SwiGLU, GeGLU.

    Args:
        x: [..., K], not empty; with a norm K is a multiple of 16.
        gate, up: weights [F, K], no bias. down: weight [N, F].
        activation: a key of :data:`halo_train.ops.fused_reference.ACTIVATIONS`.
        config: of all three; see :func:`why_not_fused`.
        equalizer: of gate and up, [K]. down_equalizer: of down, [F].
        norm: of x; None takes x as it is.

    Returns:
        [..., N] in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: a config that is not fused; gate or up with a bias; shapes or dtypes that do not fit.
    """
    out_dtype = _check("halo_gated_mlp", x, (gate, up), config, norm)
    if gate.bias is not None or up.bias is not None:
        raise ValueError("halo_gated_mlp: gate and up must have no bias; call the three layers one by one")
    shapes = [tuple(layer.weight.shape) for layer in (gate, up, down)]
    if shapes[0] != shapes[1] or shapes[2][1] != shapes[0][0]:
        raise ValueError(
            f"halo_gated_mlp: gate, up and down must have weights [F, K], [F, K] and [N, F]; got {shapes}"
        )
    form = None if norm is None else norm._replace(weight=None, bias=None)
    arguments = Arguments(config, out_dtype, form, activation)
    factors = (*(equalizer or (None, None)), *(down_equalizer or (None, None)))
    with without_autocast(x.device.type):
        y: Tensor = GatedMLPFunction.apply(
            arguments, *_input(x, norm, out_dtype), *factors, *flatten((gate, up, down))
        )
    return y


def why_not_fused(config: HaloConfig) -> str:
    """Why layers of this config run one by one, or an empty string."""
    if config.format is Format.HIGH_PRECISION:
        return f"recipe {config.name} does not round"
    if config.scaling is not Scaling.ROWWISE:
        return f"recipe {config.name} has one scale for a whole tensor, which is known only when all of it has been written"
    if config.rotate_m_dgrad:
        return f"recipe {config.name} rotates gradients along the tokens"
    return ""


def _input(
    x: Tensor, norm: Norm | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x in the dtype that the norm reads or the products write, and the norm's tensors."""
    return (x.to(out_dtype), None, None) if norm is None else (x, norm.weight, norm.bias)


def _check(op: str, x: Tensor, layers: Sequence[Layer], config: HaloConfig, norm: Norm | None) -> torch.dtype:
    """The dtype of the results."""
    ops.check_input(op, x)
    if reason := why_not_fused(config):
        raise ValueError(f"{op}: {reason}; call the layers one by one")
    if not layers or any(layer.weight.shape[1] != x.shape[-1] for layer in layers):
        raise ValueError(
            f"{op}: the weights that read x must be [N, {x.shape[-1]}]; got {[tuple(layer.weight.shape) for layer in layers]}"
        )
    if x.numel() == 0:
        raise ValueError(f"{op}: x must not be empty; got shape {tuple(x.shape)}; call the layers one by one")
    if norm is not None and x.shape[-1] % MULTIPLE:
        raise ValueError(
            f"{op}: with a norm the last dimension of x must be a multiple of {MULTIPLE}; got {x.shape[-1]}; apply the norm first"
        )
    target = autocast_dtype(x)
    if target is None and any(layer.weight.dtype != x.dtype for layer in layers):
        raise ValueError(
            f"{op}: x and the weights must have the same dtype outside autocast; got {x.dtype} and "
            f"{[layer.weight.dtype for layer in layers]}; cast one of them or run under torch.autocast"
        )
    return x.dtype if target is None else target
