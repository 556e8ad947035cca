"""RMSNorm and LayerNorm whose output is rounded to 8 bits where it is made, and their backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import HaloConfig, storage_dtype
from ..ops import fused_reference
from ..quantize import Quantized, quantize_tiles


class Norm(NamedTuple):
    """y = (x - mean) rstd gain + bias over the last axis, rstd = 1 / sqrt(mean((x - mean)^2) + eps); mean is 0 but in a LayerNorm."""

    weight: Tensor | None
    """[K]; the gain, or None for ones."""
    bias: Tensor | None
    """[K] or None; only with ``center``."""
    eps: float
    center: bool = False
    """LayerNorm; else RMSNorm."""
    unit_offset: bool = False
    """The gain is 1 + weight, as in Gemma."""

    def gain(self) -> Tensor | None:
        """[K], in the dtype of the weight, float32 with ``unit_offset``."""
        if self.weight is None or not self.unit_offset:
            return self.weight
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def quantize(
        self, x: Tensor, config: HaloConfig, block: int, col_scale: Tensor | None
    ) -> tuple[Quantized, Tensor, Tensor]:
        """Rows of (y diag(col_scale)) H_block rounded once, from float32; y itself is not written.

        Args:
            x: [M, K]; the others as for :func:`halo_train.quantize.quantize`.

        Returns:
            data [M, K] with its scales [M]; mean, [M, 1] with ``center``, else [0]; rstd [M, 1].
        """
        dtype = storage_dtype(config.format, x.dtype)
        data, scale, mean, rstd = ops.norm_quantize(
            x, self.gain(), self.bias, self.eps, self.center, dtype, block, col_scale
        )
        return Quantized(data, scale), mean, rstd

    def quantize_columns(self, x: Tensor, rstd: Tensor, scale: Tensor, config: HaloConfig) -> Quantized:
        """Of an RMSNorm :func:`halo_train.operands.quantize_input_columns` of its output, which is not written.

        Args:
            x: [M, K]; rstd: [M, 1] and scale: [M'], of :meth:`quantize`.

        Returns:
            data [K, M'] with a scale for each tile.
        """
        missing, factors = scale.shape[0] - x.shape[0], rstd.flatten()
        if missing:
            x, factors = F.pad(x, (0, 0, 0, missing)), F.pad(factors, (0, missing))
        return quantize_tiles(x, config.format, scale, factors, self.gain())

    def backward(
        self,
        dys: Sequence[Tensor],
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        needs_dx: bool,
        needs_dweight: bool,
        needs_dbias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx [M, K] in the dtype of x; dweight and dbias [K] in theirs; None for what is not needed.

        Args:
            dys: [M, K], any dtype, of which the sum is the gradient of y; x, mean, rstd: of the forward.
        """
        needs = [needs_dx, needs_dweight, needs_dbias]
        found: tuple[Tensor | None, ...]
        if self.center:
            found = self._layer_norm_backward(functools.reduce(torch.add, dys), x, mean, rstd, needs)
        else:
            # Of the formula the compiler makes kernels that add the residual's gradient too.
            compiling = torch.compiler.is_compiling()
            rms_norm_backward = fused_reference.rms_norm_backward if compiling else ops.rms_norm_backward
            dx, dweight = rms_norm_backward(list(dys), x, self.gain(), rstd)
            found = dx, None if self.weight is None else dweight.to(self.weight.dtype), None
        dx_, dweight_, dbias = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
        return dx_, dweight_, dbias

    def _layer_norm_backward(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        if x.is_cuda and all(t is None or t.dtype == x.dtype for t in (self.weight, self.bias)):
            return torch.ops.aten.native_layer_norm_backward(
                dy.to(x.dtype), x, x.shape[1:], mean, rstd, self.weight, self.bias, needs
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        dy, unit = dy.to(wide), (x.to(wide) - mean) * rstd
        g = dy if self.weight is None else dy * self.weight.to(wide)
        dx = rstd * (g - unit * (g * unit).mean(1, keepdim=True) - g.mean(1, keepdim=True))
        dweight = None if self.weight is None else (dy * unit).sum(0).to(self.weight.dtype)
        dbias = None if self.bias is None else dy.sum(0).to(self.bias.dtype)
        return dx.to(x.dtype), dweight, dbias
