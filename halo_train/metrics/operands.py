"""Rounded operands of a sample of rows or columns, as they are when the whole tensor is rounded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Format, HaloConfig, Scaling
from ..gemm import MULTIPLE, matmul
from ..hadamard import hadamard_transform, largest_block
from ..operands import pad_tokens, quantize_grad_for_dgrad, quantize_grad_for_wgrad
from ..quantize import Equalizer, Quantized, quantize
from .sample import SampleSize
from .statistics import WholeTensor


class Draws:
    """The tokens, output and input features that one step measures: one draw for every length of an axis.

    Args:
        generator: on the device of the layers.
    """

    def __init__(self, size: SampleSize, generator: torch.Generator) -> None:
        self._sizes = {"tokens": size.tokens, "outputs": size.out_features, "inputs": size.in_features}
        self._generator = generator
        self._drawn: dict[tuple[str, int], Tensor] = {}
        self._rotations: dict[tuple[int, torch.dtype], tuple[Quantized, Tensor]] = {}

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

    def rotation(self, n: int, dtype: torch.dtype) -> tuple[Quantized, Tensor]:
        """Columns of the rotation of n input features, those drawn, and the 1 that raw data is scaled by to meet them.

        Returns:
            data [C', K'] of +1 and -1 in an 8-bit ``dtype``, one column a row, then rows of zeros; C' and K' are multiples
            of 16. Both scales are [], float32.
        """
        if (n, dtype) not in self._rotations:
            chosen = self.take("inputs", n)
            count = len(chosen)
            unit = torch.zeros(
                count + -count % MULTIPLE, n + -n % MULTIPLE, dtype=torch.float32, device=chosen.device
            )
            unit[:count].scatter_(1, chosen[:, None], 1.0)
            # +1 and -1 are exact in every 8-bit dtype, and e5m2 data multiplies e4m3 only.
            stored = torch.float8_e4m3fn if dtype == torch.float8_e5m2 else dtype
            signs, one = hadamard_transform(unit, scale=1.0).to(stored), unit.new_ones(())
            self._rotations[n, dtype] = Quantized(signs, one / math.sqrt(largest_block(unit.shape[1]))), one
        return self._rotations[n, dtype]


class SampledRows:
    """Rows of X and of W one below the other, so that one call rounds both; padded to K' columns, a multiple of 16.

    Args:
        x: [S, K]; w: [P, K]. equalizer: X is divided by its d and W multiplied, or None.
    """

    def __init__(self, x: Tensor, w: Tensor, equalizer: Equalizer | None) -> None:
        self._count, extra = len(x), -x.shape[1] % MULTIPLE
        self._plain = _pad(torch.cat([x, w]), 0, extra)
        self._equalized = (
            None if equalizer is None else _pad(torch.cat([x * equalizer.inverse, w * equalizer.d]), 0, extra)
        )

    def parts(self) -> dict[str, slice]:
        """Which rows are those of X and of W."""
        return {"x": slice(self._count), "w": slice(self._count, None)}

    def exact(self, config: HaloConfig | None) -> Tensor:
        """[S + P, K'], what the recipe rounds; None: as they are."""
        rows = self._plain if config is None else self._before_rotation(config)
        if config is not None and config.rotate_k:
            rows = hadamard_transform(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        return rows

    def rounded(self, config: HaloConfig) -> Quantized:
        """The same rounded with row scales."""
        rows = self._before_rotation(config)
        return quantize(rows, config.format, block=largest_block(rows.shape[1]) if config.rotate_k else 1)

    def rounded_as_parts(self, fmt: Format, x_amax: Tensor, w_amax: Tensor) -> Quantized:
        """As they are, rounded as in the whole X and the whole W with one scale each, of amax [] of them."""
        rows = self._plain
        amax = torch.cat([x_amax.expand(self._count), w_amax.expand(len(rows) - self._count)])
        return _round_with_amax(rows, amax, fmt)

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
    q: Quantized, undo: Tensor | None, draws: Draws, features: int, out: Tensor, *, rotated: bool
) -> None:
    """The drawn input features of what the data of a rounded operand stands for, rotation and equalisation undone.

    A float8 GEMM sums in fewer bits than float32; 20 dB below what the rounding to float8 costs (numerics.md, section 5).

    Args:
        q: data [R', K'], see :func:`round_operand`; its scale is not applied.
        undo: what takes the equalisation of the drawn features back, [C], or None.
        out: [R, C], receives the values.
    """
    if rotated:
        columns, one = draws.rotation(features, q.data.dtype)
        values = matmul(Quantized(q.data, one), columns, q.scale.dtype)[: len(out), : out.shape[1]]
    else:
        chosen = draws.take("inputs", features)
        values = _bytes(q.data)[: len(out), chosen].view(q.data.dtype).to(q.scale.dtype)
    if undo is None:
        out.copy_(values)
    else:
        torch.mul(values, undo, out=out)


class Unrotated:
    """A matrix [R, K] rounded as it is, without rotation or fold, of which only slices are needed.

    Args:
        whole: its reductions. dtype: its own.
    """

    def __init__(self, whole: WholeTensor, dtype: torch.dtype) -> None:
        self._whole, self._dtype = whole, dtype
        self._amax: dict[Scaling, Tensor] = {}

    def amax(self, scaling: Scaling) -> Tensor:
        """[R] or [] in the dtype of the matrix, exact: each is the magnitude of an element."""
        if scaling not in self._amax:
            amax = self._whole.row_amax if scaling is Scaling.ROWWISE else self._whole.amax
            self._amax[scaling] = amax.to(self._dtype)
        return self._amax[scaling]

    def columns(self, values: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
        """Some of its columns, [R, C], with one scale a row, all equal where the matrix has one."""
        return _round_with_amax(values, self.amax(scaling).expand(len(values)), fmt)

    def rows(self, values: Tensor, fmt: Format, scaling: Scaling) -> Quantized:
        """Some of its rows, [S, K]; or of its columns as rows where it has one scale."""
        return quantize(values, fmt) if scaling is Scaling.ROWWISE else self.columns(values, fmt, scaling)


def take_rows(q: Quantized, rows: Tensor | slice) -> Quantized:
    """The rows of a rounded matrix, with one scale each."""
    # Not every device can index float8.
    data = _bytes(q.data)[rows].view(q.data.dtype)
    return Quantized(data, q.scale[rows] if q.scale.dim() else q.scale.expand(len(data)))


def below(upper: Quantized, lower: Quantized) -> Quantized:
    """Rounded matrices with row scales, one below the other."""
    data = torch.cat([_bytes(upper.data), _bytes(lower.data)]).view(upper.data.dtype)
    return Quantized(data, torch.cat([upper.scale, lower.scale]))


def grad_rows(
    e: Tensor,
    rows: Tensor,
    unrotated: Unrotated,
    tokens: Tensor,
    fold: Tensor | None,
    config: HaloConfig,
    out: Tensor,
) -> Quantized:
    """Rows of E as they are rounded for dgrad.

    Args:
        e: [M, N]; tokens: [S] indices; rows: E[tokens]; unrotated: of E; fold: row scales of the rounded W, [N], where they
            are folded into E.
        out: [S, N] float64, receives the values that multiply W: rotation undone, the fold left in.
    """
    if config.rotate_m_dgrad:
        # Every token is mixed into every row.
        whole = quantize_grad_for_dgrad(pad_tokens(_pad(e, -e.shape[0] % MULTIPLE, 0)), fold, config)
        out.copy_(hadamard_transform(whole.dequantize(), axis=0)[tokens])
        return take_rows(whole, tokens)
    if config.scaling is Scaling.ROWWISE:
        q = quantize_grad_for_dgrad(rows, fold, config)
    else:
        q = unrotated.rows(rows, config.grad_format, config.scaling)
    values_into(out, q)
    return q


def grad_columns(
    columns: Tensor, unrotated: Unrotated, x_scale: Tensor, config: HaloConfig, out: Tensor
) -> Quantized:
    """Columns of E as they are rounded for wgrad: rows of its transpose, [S, M].

    Args:
        columns: [M, S] of E; unrotated: of E; x_scale: scales of the rounded X, [M].
        out: [S, M] float64, receives the values that multiply X: the fold left in.
    """
    if config.scaling is Scaling.ROWWISE:
        q = quantize_grad_for_wgrad(columns, x_scale, config)
    else:
        q = unrotated.rows(columns.t(), config.grad_format, config.scaling)
    values_into(out, q)
    return q


def values_into(out: Tensor, q: Quantized) -> None:
    """Writes the values that a rounded matrix with row scales stands for into a float64 one."""
    # float8 does not multiply; bfloat16 holds all of its values.
    data = q.data.bfloat16() if q.data.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else q.data
    torch.mul(data, q.scale[:, None], out=out)


def _round_with_amax(values: Tensor, amax: Tensor, fmt: Format) -> Quantized:
    """Parts [R, C] of rows whose largest magnitudes [R] are known, rounded as in the whole rows."""
    # Columns of amax beside them decide the scales; as many as leave rows aligned that were.
    known = amax[:, None].expand(-1, MULTIPLE)
    q = quantize(torch.cat([values, known], 1), fmt)
    return Quantized(q.data[:, : values.shape[1]], q.scale)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    # Padding by nothing would copy.
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.element_size() == 1 else data
