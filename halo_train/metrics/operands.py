"""Rounded operands of a sample of rows or columns, as they are when the whole tensor is rounded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Format, HaloConfig, Scaling, storage_dtype
from ..functional import pad_tokens, quantize_grad_for_dgrad, quantize_grad_for_wgrad
from ..gemm import MULTIPLE, matmul
from ..hadamard import hadamard_transform, largest_block
from ..quantize import Quantized, quantize
from ..reference import QMAX, round_values, scales_of
from .sample import SampleSize


class Draws:
    """The tokens, output and input features that one step measures: one draw for every length of an axis.

    Args:
        generator: on the device of the layers.
    """

    def __init__(self, size: SampleSize, generator: torch.Generator) -> None:
        self._sizes = {"tokens": size.tokens, "outputs": size.out_features, "inputs": size.in_features}
        self._generator = generator
        self._drawn: dict[tuple[str, int], Tensor] = {}
        self._signs: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, axis: str, n: int) -> Tensor:
        """Different indices below n, all of them where the sample is not smaller.

        Args:
            axis: ``"tokens"``, ``"outputs"`` or ``"inputs"``.
        """
        if (axis, n) not in self._drawn:
            device, size = self._generator.device, self._sizes[axis]
            order = torch.rand(n, generator=self._generator, device=device).argsort() if size < n else None
            self._drawn[axis, n] = torch.arange(n, device=device) if order is None else order[:size]
        return self._drawn[axis, n]

    def signs(self, n: int, dtype: torch.dtype) -> Tensor:
        """Columns of the rotation of n input features, those drawn, as +1 and -1.

        Returns:
            [C', K'] in an 8-bit ``dtype``: one column a row, then rows of zeros; C' and K' are multiples of 16.
        """
        if (n, dtype) not in self._signs:
            chosen = self.take("inputs", n)
            count = len(chosen)
            unit = torch.zeros(
                count + -count % MULTIPLE, n + -n % MULTIPLE, dtype=torch.float32, device=chosen.device
            )
            unit[:count].scatter_(1, chosen[:, None], 1.0)
            # +1 and -1 are exact in every 8-bit dtype, and e5m2 data multiplies e4m3 only.
            stored = torch.float8_e4m3fn if dtype == torch.float8_e5m2 else dtype
            self._signs[n, dtype] = hadamard_transform(unit, scale=1.0).to(stored)
        return self._signs[n, dtype]


class SampledRows:
    """Rows of X and of W one below the other, so that one call rounds both; padded to K' columns, a multiple of 16.

    Args:
        x: [S, K]; w: [P, K]. d: what equalisation divides X by and multiplies W by, [K], or None.
    """

    def __init__(self, x: Tensor, w: Tensor, d: Tensor | None) -> None:
        self._count, extra = len(x), -x.shape[1] % MULTIPLE
        self._plain = _pad(torch.cat([x, w]), 0, extra)
        self._equalized = None if d is None else _pad(torch.cat([x / d, w * d]), 0, extra)

    def exact(self, config: HaloConfig | None) -> tuple[Tensor, Tensor]:
        """Of X and of W what the recipe rounds; None: as they are."""
        rows = self._plain if config is None else self._before_rotation(config)
        if config is not None and config.rotate_k:
            rows = hadamard_transform(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        return rows[: self._count], rows[self._count :]

    def rounded(self, config: HaloConfig) -> tuple[Quantized, Quantized]:
        """The same rounded with row scales."""
        rows = self._before_rotation(config)
        q = quantize(rows, config.format, block=largest_block(rows.shape[1]) if config.rotate_k else 1)
        return take_rows(q, slice(self._count)), take_rows(q, slice(self._count, None))

    def _before_rotation(self, config: HaloConfig) -> Tensor:
        return self._equalized if config.equalize and self._equalized is not None else self._plain


def round_operand(a: Tensor, factor: Tensor | None, config: HaloConfig) -> Quantized:
    """X or W as ``quantize_operands`` rounds it.

    Args:
        a: [R, K]. factor: what equalisation multiplies its columns by, [K], or None.

    Returns:
        [R', K'], padded to multiples of 16.
    """
    a = _pad(a, -a.shape[0] % MULTIPLE, -a.shape[1] % MULTIPLE)
    width = a.shape[1]
    if factor is not None and len(factor) < width:
        factor = F.pad(factor, (0, width - len(factor)), value=1.0)
    return quantize(
        a,
        config.format,
        scaling=config.scaling,
        block=largest_block(width) if config.rotate_k else 1,
        col_scale=factor,
    )


def operand_columns(
    q: Quantized, undo: Tensor | None, features: int, draws: Draws, *, rotated: bool
) -> Tensor:
    """The drawn input features of what a rounded operand stands for, rotation and equalisation undone.

    A float8 GEMM sums in fewer bits than float32; 20 dB below what the rounding to float8 costs (numerics.md, section 5).

    Args:
        q: data [R', K'], see :func:`round_operand`.
        undo: what takes the equalisation back, [features], or None.

    Returns:
        [R', C] in the dtype of the scale.
    """
    chosen = draws.take("inputs", features)
    factor = q.scale.new_ones(len(chosen)) if undo is None else undo[chosen]
    if not rotated:
        return Quantized(_bytes(q.data)[:, chosen].view(q.data.dtype), q.scale).dequantize() * factor
    signs = draws.signs(features, q.data.dtype)
    factor = factor / math.sqrt(largest_block(signs.shape[1]))
    if len(factor) < len(signs):
        factor = F.pad(factor, (0, len(signs) - len(factor)))
    return matmul(q, Quantized(signs, factor), q.scale.dtype)[:, : len(chosen)]


class Unrotated:
    """A matrix [R, K] rounded as it is, without rotation or fold, of which only slices are needed.

    Args:
        row_amax: [R]; amax: [] of all of it.
    """

    def __init__(self, row_amax: Tensor, amax: Tensor) -> None:
        self._amax = {Scaling.ROWWISE: row_amax, Scaling.TENSORWISE: amax}
        self._scales: dict[tuple[Format, Scaling], tuple[Tensor, Tensor]] = {}

    def columns(self, values: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
        """Some of its columns, [R, C]; or some rows [S, K], with one scale for all."""
        dtype = storage_dtype(fmt, values.dtype)
        wide = torch.promote_types(values.dtype, torch.float32)
        if (fmt, scaling) not in self._scales:
            self._scales[fmt, scaling] = scales_of(self._amax[scaling].to(wide), dtype)
        scale, inverse = self._scales[fmt, scaling]
        return Quantized(round_values(values.to(wide), inverse, dtype), scale)

    def rows(self, values: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
        """Some of its rows, [S, K]."""
        return quantize(values, fmt) if scaling is Scaling.ROWWISE else self.columns(values, fmt, scaling)


def take_rows(q: Quantized, rows: Tensor | slice) -> Quantized:
    """The rows of a rounded matrix."""
    # Not every device can index float8.
    data = _bytes(q.data)[rows].view(q.data.dtype)
    return Quantized(data, q.scale[rows] if q.scale.dim() else q.scale)


def grad_rows(
    e: Tensor,
    rows: Tensor,
    unrotated: Unrotated,
    tokens: Tensor,
    w_scale: Tensor,
    config: HaloConfig,
    out: Tensor,
) -> Quantized:
    """Rows of E as they are rounded for dgrad.

    Args:
        e: [M, N]; tokens: [S] indices; rows: E[tokens]; unrotated: of E; w_scale: scales of the rounded W, [N] or [].
        out: [S, N] float64, receives the values that they contribute to dX: rotation and fold undone.
    """
    if config.rotate_m_dgrad:
        # Every token is mixed into every row.
        whole = quantize_grad_for_dgrad(pad_tokens(_pad(e, -e.shape[0] % MULTIPLE, 0)), w_scale, config)
        out.copy_(hadamard_transform(whole.dequantize(), axis=0)[tokens])
        q = take_rows(whole, tokens)
    elif config.scaling is Scaling.ROWWISE:
        q = quantize_grad_for_dgrad(rows, w_scale, config)
        values_into(out, q)
    else:
        q = unrotated.rows(rows, config.grad_format, config.scaling)
        values_into(out, q)
    _unfold(out, w_scale)
    return q


def grad_columns(
    columns: Tensor, unrotated: Unrotated, x_scale: Tensor, config: HaloConfig, out: Tensor
) -> Quantized:
    """Columns of E as they are rounded for wgrad: rows of its transpose, [S, M].

    Args:
        columns: [M, S] of E; unrotated: of E; x_scale: scales of the rounded X, [M] or [].
        out: [S, M] float64, receives the values that they contribute to dW: fold undone.
    """
    if config.scaling is Scaling.ROWWISE:
        q = quantize_grad_for_wgrad(columns, x_scale, config)
    else:
        q = unrotated.rows(columns.t(), config.grad_format, config.scaling)
    values_into(out, q)
    _unfold(out, x_scale)
    return q


def largest_value(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """amax of the values that were rounded to ``dtype`` with these scales; zero rows are the caller's to exclude."""
    return scale * QMAX.get(dtype, 1.0)


def values_into(out: Tensor, q: Quantized) -> None:
    """Writes the values that a rounded matrix stands for into a float64 one."""
    # float8 does not multiply; bfloat16 holds all of its values.
    data = q.data.bfloat16() if q.data.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else q.data
    # Not a scalar: that would leave the product in bfloat16.
    torch.mul(data, q.scale.reshape(-1, 1), out=out)


def _unfold(values: Tensor, scale: Tensor) -> None:
    # One scale for all is not folded.
    if scale.dim():
        values /= scale


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    # Padding by nothing would copy.
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.element_size() == 1 else data
