"""How the autograd Functions of fused parts round what their layers read, in forward and again in backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..config import HaloConfig, storage_dtype
from ..gemm import MULTIPLE
from ..operands import pad_matrix, pad_vector, quantize_input, rotation_block, takes_input_columns
from ..products import again
from ..quantize import Quantized
from .norms import Norm


class Arguments(NamedTuple):
    """What is no tensor."""

    config: HaloConfig
    out_dtype: torch.dtype
    norm: Norm | None
    """Without its tensors."""
    activation: str = ""


def round_input(
    tokens: Tensor, arguments: Arguments, gain: Tensor | None, shift: Tensor | None, inverse: Tensor | None
) -> tuple[Quantized, tuple[Tensor | None, ...]]:
    """(norm(x) D^-1) H rounded, and what the norm's backward takes: x, weight, bias, mean, rstd."""
    config = arguments.config
    if arguments.norm is None:
        return quantize_input(tokens, inverse, config), (None,) * 5
    norm, m = arguments.norm._replace(weight=gain, bias=shift), tokens.shape[0]
    block = rotation_block(tokens.shape[1], config)
    rounded, mean, rstd = norm.quantize(pad_matrix(tokens, MULTIPLE, 1), config, block, inverse)
    return rounded, (tokens, gain, shift, mean[:m], rstd[:m])


def recomputes(arguments: Arguments) -> bool:
    """Whether the rounded input is made again in backward: from what the norm's backward takes anyway."""
    return arguments.config.recomputes_inputs and arguments.norm is not None


def round_input_again(
    of_norm: tuple[Tensor | None, ...],
    inverse: Tensor | None,
    e: Tensor,
    x_shape: torch.Size,
    arguments: Arguments,
) -> Tensor:
    """The data of the rounded input from x and the norm's weight and bias."""
    tokens, gain, shift = of_norm
    assert tokens is not None
    factors = again(inverse, x_shape[-1], e)
    return round_input(tokens, arguments, gain, shift, factors)[0].data


def takes_columns(tokens: Tensor, weights: Sequence[Tensor], arguments: Arguments) -> bool:
    """Whether wgrad takes the columns of an RMSNorm's output, which backward makes of what the norm's backward takes anyway."""
    out_features = column_features(arguments.norm, [weight.shape[0] for weight in weights])
    return takes_input_columns(tokens, out_features, arguments.config)


def column_features(norm: Norm | None, out_features: Iterable[int]) -> int:
    """What :func:`takes_input_columns` asks of layers with these output features that read norm(x): 0 where there are no columns."""
    return sum(out_features) if norm is not None and not norm.center else 0


def round_columns(of_norm: tuple[Tensor | None, ...], scale: Tensor, arguments: Arguments) -> Quantized:
    """The columns of the rounded input from x, the norm's weight and rstd; scale: that of its rows, by :func:`after`, so that a compiler
    does not make them in forward."""
    tokens, gain, _, _, rstd = of_norm
    assert arguments.norm is not None
    assert tokens is not None
    assert rstd is not None
    return arguments.norm._replace(weight=gain).quantize_columns(tokens, rstd, scale, arguments.config)


def round_hidden(
    gate: Tensor, up: Tensor, inverse: Tensor | None, width: int, arguments: Arguments
) -> Quantized:
    """(act(gate) up D^-1) H rounded, padded as gate and up are; width: what of them is no padding."""
    config = arguments.config
    factors = None if inverse is None else pad_vector(inverse, gate.shape[1])
    dtype, block = storage_dtype(config.format, gate.dtype), rotation_block(width, config)
    return Quantized(*ops.gated_quantize(gate, up, arguments.activation, dtype, block, factors))
