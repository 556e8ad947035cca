"""Rounded operands of a sample of rows or columns, as they are when the whole tensor is rounded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Format, HaloConfig, Scaling
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
            wide = torch.promote_types(self._a.dtype, torch.float32)
            # One pass: a bfloat16 matrix times a float32 vector is float32.
            y = self._a.to(wide) if factor is None else self._a * factor.to(wide)
            self._rotated[key] = hadamard_transform(y) if config.rotate_k else y
        return self._rotated[key]

    def rounded(self, config: HaloConfig) -> Quantized:
        return quantize(self.exact(config), config.format, scaling=config.scaling)


def take_rows(q: Quantized, rows: Tensor | slice) -> Quantized:
    """The rows of a rounded matrix."""
    # Not every device can index float8.
    data = _bytes(q.data)[rows].view(q.data.dtype)
    return Quantized(data, q.scale[rows] if q.scale.dim() else q.scale)


def rotation_columns(width: int, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of the rotation of an axis of ``width``, as +1 and -1: [width, C]."""
    unit = torch.zeros(len(chosen), width, dtype=dtype, device=chosen.device)
    unit.scatter_(1, chosen[:, None], 1.0)
    return hadamard_transform(unit, scale=1.0).t()


def unrotated_columns(q: Quantized, signs: Tensor) -> Tensor:
    """Columns of what a rotated and rounded matrix stands for, its rotation undone: (diag(scale) q H)[:, chosen].

    Args:
        q: data [R, K'].
        signs: [K', C], see :func:`rotation_columns`.

    Returns:
        [R, C] in the dtype of the scale.
    """
    scale = q.scale / math.sqrt(largest_block(q.data.shape[1]))
    if q.data.is_cuda and q.data.element_size() == 1:
        # 8-bit values and signs are exact in bfloat16, and the products are summed in float32.
        picked = torch.mm(q.data.bfloat16(), signs.bfloat16(), out_dtype=torch.float32)
    else:
        picked = q.data.to(scale.dtype) @ signs
    return picked * (scale[:, None] if scale.dim() else scale)


def unrotated(rows: Tensor, amax: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
    """Some rows of a matrix rounded as they are in the whole matrix, without rotation or fold.

    Args:
        rows: [R, Q]. amax: of the whole matrix.
    """
    if scaling is Scaling.ROWWISE:
        return quantize(rows, fmt)
    q = quantize(_with_row(rows, amax), fmt, scaling=scaling)
    return take_rows(q, slice(rows.shape[0]))


def unrotated_slice(columns: Tensor, row_amax: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
    """Some columns of a matrix rounded as they are in the whole matrix, without rotation or fold.

    Args:
        columns: [R, C]. row_amax: [R], of the whole rows.
    """
    # A row keeps its scale when it holds its largest value, and the matrix its own.
    wider = torch.cat([columns, row_amax[:, None].to(columns.dtype)], 1)
    q = quantize(wider, fmt, scaling=scaling)
    return Quantized(q.data[:, : columns.shape[1]], q.scale)


def grad_rows(
    e: Tensor, amax: Tensor, tokens: Tensor, w_scale: Tensor, config: HaloConfig
) -> tuple[Quantized, Tensor]:
    """Rows of E as they are rounded for dgrad.

    Args:
        e: [M, N]; amax: of all of it; tokens: [S] indices; w_scale: scales of the rounded W, at least [N], or [].

    Returns:
        The rounded rows [S, N], and the values that they contribute to dX: rotation and fold undone, float64.
    """
    if w_scale.dim():
        w_scale = w_scale[: e.shape[1]]
    if config.rotate_m_dgrad:
        # Every token is mixed into every row.
        whole = pad_tokens(_pad(e, -e.shape[0] % MULTIPLE, 0))
        q = quantize_grad_for_dgrad(whole, w_scale, config)
        values = hadamard_transform(q.dequantize(), axis=0)[tokens].double()
        q = take_rows(q, tokens)
    else:
        rows = e[tokens] if config.scaling is Scaling.ROWWISE else _with_row(e[tokens], amax)
        q = take_rows(quantize_grad_for_dgrad(rows, w_scale, config), slice(len(tokens)))
        values = values_of(q)
    return q, unfold(values, w_scale)


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
        chosen = _with_row(chosen.t(), amax).t().contiguous()
    else:
        x_scale = x_scale[:tokens]
    q = take_rows(quantize_grad_for_wgrad(chosen, x_scale, config), slice(len(outputs)))
    return q, unfold(values_of(q), x_scale)


def values_of(q: Quantized) -> Tensor:
    """The values that rounded data stands for, in float64."""
    return q.data.double() * (q.scale[:, None] if q.scale.dim() else q.scale)


def unfold(values: Tensor, scale: Tensor) -> Tensor:
    """values diag(scale)^-1; one scale for all is not folded."""
    return values / scale if scale.dim() else values


def largest_value(q: Quantized) -> Tensor:
    """amax of the values that a rounded tensor was made from, from its scales; zero rows are the caller's to exclude."""
    return q.scale.double() * QMAX.get(q.data.dtype, 1.0)


def _with_row(rows: Tensor, amax: Tensor) -> Tensor:
    # One scale for all is that of the whole tensor when the sample holds its largest value.
    extra = F.pad(amax.to(rows.dtype).reshape(1, 1), (0, rows.shape[1] - 1))
    return torch.cat([rows, extra])


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    # Padding by nothing would copy.
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.element_size() == 1 else data
