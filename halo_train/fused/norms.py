"""RMSNorm and LayerNorm whose output is rounded to 8 bits where it is made, and their backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..config import HaloConfig, storage_dtype
from ..quantize import Quantized


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

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        needs_dx: bool,
        needs_dweight: bool,
        needs_dbias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx [M, K] in the dtype of x; dweight and dbias [K] in theirs; None for what is not needed.

        Args:
            dy: [M, K], any dtype; x, mean, rstd: of the forward.
        """
        mask, k = [needs_dx, needs_dweight, needs_dbias], x.shape[1]
        alike = all(t is None or t.dtype == x.dtype for t in (self.weight, self.bias))
        if not alike or self.unit_offset or not x.is_cuda:
            return self._backward(dy, x, mean, rstd, mask)
        dy = dy.to(x.dtype)  # PyTorch's kernels take one dtype
        if self.center:
            found = torch.ops.aten.native_layer_norm_backward(
                dy, x, [k], mean, rstd, self.weight, self.bias, mask
            )
        else:
            found = (*torch.ops.aten._fused_rms_norm_backward(dy, x, [k], rstd, self.weight, mask[:2]), None)
        dx, dweight, dbias = (grad if needed else None for grad, needed in zip(found, mask, strict=True))
        return dx, dweight, dbias

    def _backward(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dy, gain = dy.to(wide), self.gain()
        unit = (x.to(wide) - mean if self.center else x.to(wide)) * rstd
        dx = dweight = dbias = None
        if mask[0]:
            g = dy if gain is None else dy * gain.to(wide)
            dx = g - unit * (g * unit).mean(1, keepdim=True)
            if self.center:
                dx = dx - g.mean(1, keepdim=True)
            dx = (dx * rstd).to(x.dtype)
        if mask[1] and self.weight is not None:
            dweight = (dy * unit).sum(0).to(self.weight.dtype)
        if mask[2] and self.bias is not None:
            dbias = dy.sum(0).to(self.bias.dtype)
        return dx, dweight, dbias
