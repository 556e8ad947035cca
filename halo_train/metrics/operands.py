"""Rounded operands of a sample of rows or columns, as they are when the whole tensor is rounded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import HaloConfig, Scaling
from ..functional import pad_tokens, quantize_grad_for_dgrad, quantize_grad_for_wgrad
from ..gemm import MULTIPLE
from ..hadamard import hadamard_transform, largest_block
from ..quantize import Quantized, quantize
from ..reference import QMAX


class RotatedOperand:
    """X or W under several recipes: equalised and rotated once for all that share it, then rounded for each.

    What comes out is what ``quantize_operands`` rounds, which does both in one operator.

    Args:
        a: [R, K]. factor: what equalisation multiplies its columns by, [K], or None.
    """

    def __init__(self, a: Tensor, factor: Tensor | None) -> None:
        rows, width = a.shape
        self._a = _pad(a, -rows % MULTIPLE, -width % MULTIPLE)
        self._factor = None if factor is None else F.pad(factor, (0, -width % MULTIPLE), value=1.0)
        self._rotated: dict[tuple[bool, bool], Tensor] = {}

    def exact(self, config: HaloConfig) -> Tensor:
        """[R', K'], padded to multiples of 16: what the recipe rounds."""
        factor = self._factor if config.equalize else None
        key = (factor is not None, config.rotate_k)
        if not any(key):
            return self._a
        if key not in self._rotated:
            y = self._a.to(torch.promote_types(self._a.dtype, torch.float32))
            y = y if factor is None else y * factor
            self._rotated[key] = hadamard_transform(y) if config.rotate_k else y
        return self._rotated[key]

    def rounded(self, config: HaloConfig) -> Quantized:
        return quantize(self.exact(config), config.format, scaling=config.scaling)


def take_rows(q: Quantized, rows: Tensor | slice) -> Quantized:
    """The rows of a rounded matrix."""
    # Not every device can index float8.
    data = _bytes(q.data)[rows].view(q.data.dtype)
    return Quantized(data, q.scale[rows] if q.scale.dim() else q.scale)


def columns(q: Quantized, chosen: Tensor, rotated: bool, factor: Tensor | None) -> Tensor:
    """Columns of what a rounded matrix stands for, its rotation undone: (diag(scale) q H diag(factor))[:, chosen].

    Args:
        q: data [R, K'].
        chosen: [C] indices below K.
        factor: [K] or None.

    Returns:
        [R, C] in the dtype of the scale.
    """
    width, dtype = q.data.shape[1], q.scale.dtype
    if rotated:
        block = largest_block(width)
        unit = torch.zeros(len(chosen), width, dtype=dtype, device=q.data.device)
        unit.scatter_(1, chosen[:, None], 1.0)
        # Columns of the +-1 matrix: the products are exact even where float32 matrix products run in TF32.
        picked = q.data.to(dtype) @ hadamard_transform(unit, block=block, scale=1.0).t() / math.sqrt(block)
    else:
        picked = _bytes(q.data)[:, chosen].view(q.data.dtype).to(dtype)
    picked = picked * (q.scale[:, None] if q.scale.dim() else q.scale)
    return picked if factor is None else picked * factor[chosen].to(dtype)


def unrotated_rows(rows: Tensor, amax: Tensor, fmt: str, scaling: Scaling) -> Quantized:
    """Rows of a tensor rounded as they are, without rotation or fold.

    Args:
        rows: [R, Q]. amax: of the whole tensor.
    """
    if scaling is Scaling.ROWWISE:
        return quantize(rows, fmt)
    q = quantize(_with_row(rows, amax), fmt, scaling=scaling)
    return take_rows(q, slice(rows.shape[0]))


def grad_rows(
    e: Tensor, amax: Tensor, tokens: Tensor, w: Quantized, config: HaloConfig
) -> tuple[Quantized, Tensor]:
    """Rows of E as they are rounded for dgrad.

    Args:
        e: [M, N]; amax: of all of it; tokens: [S] indices; w: the rounded weight, data [N', K'].

    Returns:
        The rounded rows [S, N'], and the values that they contribute to dX: rotation and fold undone, float64.
    """
    width = w.data.shape[0]
    if config.rotate_m_dgrad:
        # Every token is mixed into every row.
        whole = pad_tokens(_pad(e, -e.shape[0] % MULTIPLE, width - e.shape[1]))
        q = quantize_grad_for_dgrad(whole, w.scale, config)
        values = hadamard_transform(q.dequantize(), axis=0)[tokens]
        q = take_rows(q, tokens)
    else:
        rows = _pad(e[tokens], 0, width - e.shape[1])
        if config.scaling is Scaling.TENSORWISE:
            rows = _with_row(rows, amax)
        q = take_rows(quantize_grad_for_dgrad(rows, w.scale, config), slice(len(tokens)))
        values = q.dequantize()
    return q, unfold(values, w.scale)


def grad_columns(
    e: Tensor, amax: Tensor, outputs: Tensor, x_scale: Tensor, config: HaloConfig
) -> tuple[Quantized, Tensor]:
    """Columns of E as they are rounded for wgrad: rows of its transpose.

    Args:
        e: [M, N]; amax: of all of it; outputs: [S] indices; x_scale: scales of the rounded X, [M'] or [].

    Returns:
        The rounded rows [S, M], and the values that they contribute to dW: fold undone, float64.
    """
    tokens = e.shape[0]
    chosen = e[:, outputs]
    if config.scaling is Scaling.TENSORWISE:
        chosen = _with_row(chosen.t(), amax).t()
    else:
        x_scale = x_scale[:tokens]
    q = take_rows(quantize_grad_for_wgrad(chosen, x_scale, config), slice(len(outputs)))
    return q, unfold(q.dequantize(), x_scale)


def unfold(values: Tensor, scale: Tensor) -> Tensor:
    """values diag(scale)^-1 in float64; one scale for all is not folded."""
    return values.double() / scale.double() if scale.dim() else values.double()


def largest_value(q: Quantized) -> Tensor:
    """amax of the values that a rounded tensor was made from, from its scales; zero rows are the caller's to exclude."""
    return q.scale.double() * QMAX.get(q.data.dtype, 1.0)


def saturated(q: Quantized) -> Tensor:
    """Where a rounded tensor is at the largest value of its format; bool, in the shape of its data."""
    return q.data.to(q.scale.dtype).abs() >= QMAX.get(q.data.dtype, 1.0)


def _with_row(rows: Tensor, amax: Tensor) -> Tensor:
    # One scale for all is that of the whole tensor when the sample holds its largest value.
    extra = F.pad(amax.to(rows.dtype).reshape(1, 1), (0, rows.shape[1] - 1))
    return torch.cat([rows, extra])


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    # Padding by nothing would copy.
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.element_size() == 1 else data
