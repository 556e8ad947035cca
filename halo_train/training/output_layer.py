"""The products of a model's output layer inside the chunked loss: in the dtype of the hidden states, or in 8 bits as its HaloConfig says."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_train import HaloConfig, HaloLinear
from halo_train.config import Format
from halo_train.gemm import matmul
from halo_train.hadamard import hadamard_transform
from halo_train.operands import (
    contract_rows,
    pad_rows,
    quantize_input,
    quantize_weight,
    rotation_block,
    round_weight,
)
from halo_train.products import crop, dgrad, for_dgrad, round_gradient, undo_fold, undo_wgrad
from halo_train.quantize import Equalizer, Quantized, RoundedWeight

from .cross_entropy import LogitMap, loss_and_slope

_ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
"""Whether ``torch.addmm`` adds a product of 16-bit matrices to a float32 one; earlier ones want a single dtype."""

_SHOWN = 512
"""Tokens that the hooks of an output layer see."""


class Rounding(NamedTuple):
    """What 8-bit products take besides h, weight and bias; as the arguments of ``halo_linear``."""

    config: HaloConfig
    equalizer: Equalizer | None
    weight: RoundedWeight | None


class Products(Protocol):
    """Of one forward of the loss, chunk after chunk: the logits of a chunk, then what its gradient is multiplied to."""

    def logits(self, h: Tensor) -> Tensor:
        """h W^T + b [m, V] of h [m, K]."""

    def gradient(self, dz: Tensor) -> Any:
        """What the other two products take of dL/dlogits [m, V] of the chunk; dz itself is not needed after."""

    def dgrad(self, gradient: Any) -> Tensor:
        """dh [m, K]."""

    def add_wgrad(self, gradient: Any) -> None:
        """Adds the chunk's part of dW to :meth:`wgrad_sum`."""

    def wgrad_sum(self) -> Tensor:
        """dW over all chunks, for :func:`finish_wgrad`."""


class PlainProducts:
    """In the dtype of h; dW is summed in float32 or wider."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs_dw: bool) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self._sum = torch.zeros_like(weight, dtype=wide) if needs_dw else None

    def logits(self, h: Tensor) -> Tensor:
        self._h = h
        return F.linear(h, self._weight, self._bias)

    def gradient(self, dz: Tensor) -> Tensor:
        return dz

    def dgrad(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight

    def add_wgrad(self, gradient: Tensor) -> None:
        assert self._sum is not None
        _add_product(self._sum, gradient.t(), self._h)

    def wgrad_sum(self) -> Tensor:
        assert self._sum is not None
        return self._sum


class RoundedProducts:
    """In 8 bits (docs/numerics.md, eq. 4 to 6). W is rounded once for all chunks, X and E chunk by chunk: with scales by row that is
    the same; where a recipe has one scale for a tensor, it is that of a chunk.

    The parts of dW, rotated and equalised as X is, are summed in the dtype that the gradient will have.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rounding: Rounding,
        needs_dh: bool,
        needs_dw: bool,
    ) -> None:
        self._config, equalizer, rounded = rounding
        d = None if equalizer is None else equalizer.d
        self._inverse = None if equalizer is None else equalizer.inverse
        if rounded is None and needs_dh:
            rounded = round_weight(weight, d, self._config)
        rows, columns = rounded or (quantize_weight(weight, d, self._config), None)
        self._rows = pad_rows(rows)  # once for all chunks
        # Of the weight itself nothing is needed any more; without dgrad there are no columns either.
        self._for_dgrad = for_dgrad(weight, *self._rows, columns, self._config)
        self._bias = None if bias is None else bias.to(dtype)
        self._needs_dh, self._needs_dw = needs_dh, needs_dw
        self._shape, self._dtype, self._sum_dtype = weight.shape, dtype, sum_dtype(weight.dtype)
        self._sum: Tensor | None = None
        self._padded: Tensor | None = None
        """Logits of the chunk with what pads them, if anything does."""

    def logits(self, h: Tensor) -> Tensor:
        self._x = quantize_input(h, self._inverse, self._config)
        z = matmul(self._x, self._rows, self._dtype, self._config.fast_accum)
        inside = crop(z, h.shape[0], self._shape[0])
        self._padded = None if inside is z else z
        return inside if self._bias is None else inside.add_(self._bias)

    def gradient(self, dz: Tensor) -> tuple[Quantized | None, Quantized | None, int]:
        (m, n), padded, self._padded = dz.shape, self._padded, None
        if (
            padded is not None and padded.data_ptr() == dz.data_ptr()
        ):  # written over the logits: else dz is copied to be padded
            padded[m:].zero_()
            padded[:, n:].zero_()
            dz = padded
        for_dh, for_dw, _ = round_gradient(
            dz, self._for_dgrad, self._x.scale, self._needs_dh, self._needs_dw, None, self._config
        )
        return for_dh, for_dw, m

    def dgrad(self, gradient: tuple[Quantized | None, Quantized | None, int]) -> Tensor:
        for_dh, _, tokens = gradient
        assert for_dh is not None
        dh = dgrad(for_dh, self._for_dgrad, self._dtype, self._config)
        if self._config.rotate_m_dgrad:
            dh = hadamard_transform(dh, axis=0)
        dh = undo_fold(dh, rotation_block(self._shape[1], self._config), self._inverse, self._config)
        return crop(dh, tokens, self._shape[1])

    def add_wgrad(self, gradient: tuple[Quantized | None, Quantized | None, int]) -> None:
        for_dw = gradient[1]
        assert for_dw is not None
        x = contract_rows(self._x)
        part = matmul(for_dw, x, self._sum_dtype, self._config.fast_accum)
        self._sum = part if self._sum is None else self._sum.add_(part)

    def wgrad_sum(self) -> Tensor:
        if self._sum is None:  # no token
            return self._rows.data.new_zeros(self._rows.data.shape, dtype=self._sum_dtype)
        return self._sum


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the 8-bit parts of dW are summed, before the gradient of the loss scales them: not in float16, which ends at 65504."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def finish_wgrad(
    total: Tensor,
    grad: Tensor,
    d: Tensor | None,
    weight: tuple[torch.Size, torch.dtype],
    config: HaloConfig | None,
) -> Tensor:
    """dW [V, K] from the sum over the chunks and the gradient of the loss; weight: shape and dtype, config: that of RoundedProducts,
    with its d."""
    shape, dtype = weight
    if config is not None:
        return crop(undo_wgrad(total, rotation_block(shape[1], config), d, grad), *shape).to(dtype)
    return torch.mul(total, grad, out=torch.empty(shape, dtype=dtype, device=total.device))


def rounding_of(head: nn.Module, hidden: Tensor) -> Rounding | None:
    """For the products of an output layer with its input [M, K], of which it may take its equaliser; None if they are not in 8 bits.

    Raises:
        ValueError: FSDP2 or tensor parallelism has taken the weight apart.
    """
    if not isinstance(head, HaloLinear) or head.config.format is Format.HIGH_PRECISION:
        return None
    equalizer = head.prepare(hidden)
    return Rounding(head.running_config, equalizer, head.operands(equalizer).rounded)


def show(head: nn.Module, hidden: Tensor, targets: Tensor, logit_map: LogitMap) -> None:
    """Calls the hooks of an 8-bit output layer, which the loss does not call, with its operands of the first tokens and their gradient."""
    if not isinstance(head, HaloLinear) or not (head.operand_hooks or head._forward_hooks):
        return
    x, targets = hidden[:_SHOWN].detach().requires_grad_(), targets[:_SHOWN]
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16):
        y = head(x)
    if torch.is_grad_enabled():
        _, e = loss_and_slope(y.detach().clone(), targets, logit_map, needs_slope=True)
        torch.autograd.grad(y, y, e)  # nothing but the hooks of y


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; of 16-bit a and b on a GPU by the product itself, in float32, without an [M, N] tensor in between."""
    if total.is_cuda and total.dtype == torch.float32 and a.element_size() == 2 and _ADDS_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
