"""Rounding to 8 bits: quantised tensors, their scales, and the equalisation of channels before they are rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import Format, Scaling, parse_choice, storage_dtype

_MAX_EXPONENT = 60
"""Bound on |log2 d_k|: keeps d, 1/d and their products with bf16 values inside float32."""


class Quantized(NamedTuple):
    """A rounded tensor: x ~= data * scale, with the scale of a row broadcast over its last axis."""

    data: Tensor
    """[..., K] in float8_e4m3fn, float8_e5m2 or int8 (float32/float64 for the format 'unrounded')."""
    scale: Tensor
    """Row scales [...], one scale [], or of data [M, K] a scale for each row and block of ``ops.SCALE_BLOCK`` columns, [blocks, M], or
    for each tile of as many rows, too, [blocks, tiles]; float32 (float64 for float64 values)."""

    def dequantize(self) -> Tensor:
        """The values that the data stands for, in the dtype of the scale."""
        scale = self.scale.unsqueeze(-1) if self.scale.dim() else self.scale
        if self.scale.dim() == self.data.dim() == 2:
            rows, columns = self.data.shape
            scale = self.scale.t().repeat_interleave(ops.SCALE_BLOCK, dim=1)[:, :columns]
            if scale.shape[0] != rows:
                scale = scale.repeat_interleave(ops.SCALE_BLOCK, dim=0)[:rows]
        return self.data.to(self.scale.dtype) * scale

    def transposed_data(self) -> Tensor:
        """The data [M, N] as a contiguous [N, M]: 8-bit GEMMs want the contracted axis adjacent in memory."""
        return ops.transpose_bytes(self.data) if self.data.element_size() == 1 else self.data.t().contiguous()


def quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    scaling: Scaling | str = Scaling.ROWWISE,
    block: int = 1,
    col_scale: Tensor | None = None,
) -> Quantized:
    """Rounds (x diag(col_scale)) H_block to 8 bits, once, from float32 values.

    scale = amax / qmax with qmax = 448 (e4m3), 57344 (e5m2) or 127 (int8); amax 0 gives scale 1.

    Args:
        x: [..., K], any real floating-point dtype.
        fmt: number format of the result.
        scaling: one scale a row (the last axis) or one for the tensor.
        block: order of the orthonormal Hadamard rotation of the last axis; a power of two dividing K; 1 is none.
        col_scale: [K] factors applied before the rotation, or None. With block > 1 positive powers of two: a GPU may look
            at their exponents alone there, and multiplies bfloat16 values in bfloat16.

    Raises:
        ValueError: unknown format or scaling, integer or complex x, block or col_scale that do not fit.
    """
    dtype = storage_dtype(parse_choice(Format, "fmt", fmt), x.dtype)
    tensorwise = parse_choice(Scaling, "scaling", scaling) is Scaling.TENSORWISE
    rounding = ops.quantize_tensor if tensorwise else ops.quantize_rows
    if x.dim() == 2:
        return Quantized(*rounding(x, dtype, block, col_scale))
    data, scale = rounding(_rows(x), dtype, block, col_scale)
    return Quantized(data.reshape(x.shape), scale if tensorwise else scale.reshape(x.shape[:-1]))


def quantize_transposed(x: Tensor, fmt: Format | str, row_scale: Tensor | None = None) -> Quantized:
    """Rounds (diag(row_scale) x)^T with one scale a row of the result.

    Args:
        x: [M, N]; row_scale: [M], or None for ones.

    Returns:
        data [N, M], scale [N].
    """
    dtype = storage_dtype(parse_choice(Format, "fmt", fmt), x.dtype)
    return Quantized(*ops.quantize_rows_transposed(x, dtype, row_scale))


def quantize_tiles(
    x: Tensor,
    fmt: Format | str,
    divisor: Tensor | None = None,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
) -> Quantized:
    """Rounds (diag(row_scale / divisor) x diag(col_scale))^T in one read of x, with a scale for each tile of ``ops.SCALE_BLOCK`` rows
    and columns, powers of two.

    Args:
        x: [M, N]; divisor, row_scale: [M], col_scale: [N], or None for ones.

    Returns:
        data [N, M], scale [blocks of M, blocks of N].
    """
    dtype = storage_dtype(parse_choice(Format, "fmt", fmt), x.dtype)
    return Quantized(*ops.quantize_tiles(x, dtype, divisor, row_scale, col_scale))


def quantize_grad(
    e: Tensor, fmt: Format | str, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Quantized, Quantized, Tensor | None]:
    """Rows of E diag(col_scale) and rows of (diag(row_scale) E)^T, in two reads of E, and on the way its column sums.

    Args:
        e: [M, N]; col_scale: [N], or None for ones; row_scale: [M].

    Returns:
        The first with data [M, N], the second with data [N, M], the sums [N] in float32 (float64 for float64) or None.
    """
    dtype = storage_dtype(parse_choice(Format, "fmt", fmt), e.dtype)
    a, u, b, v, sums = ops.quantize_grad(e, dtype, col_scale, row_scale, column_sums)
    return Quantized(a, u), Quantized(b, v), sums if column_sums else None


def quantize_grad_blocks(
    e: Tensor, fmt: Format | str, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool = False
) -> tuple[Quantized, Quantized, Tensor | None]:
    """:func:`quantize_grad` in one read of E, with a scale for each row and block of ``ops.SCALE_BLOCK`` columns, in the second form
    tokens, powers of 16.

    Returns:
        As there, with scales [blocks, M] and [blocks, N].
    """
    dtype = storage_dtype(parse_choice(Format, "fmt", fmt), e.dtype)
    a, u, b, v, sums = ops.quantize_grad_blocks(e, dtype, col_scale, row_scale, column_sums)
    return Quantized(a, u), Quantized(b, v), sums if column_sums else None


class RoundedWeight(NamedTuple):
    """W in the 8-bit forms that the products take, padded to multiples of 16."""

    rows: Quantized
    """(W D) H, data [N', K'], for fprop."""
    columns: Quantized | None
    """W^T, data [K', N'] with one scale a column of W or, where E has scales for blocks, a tile, for a dgrad that requantizes W, in int8
    with its rows divided by levels; else None: it takes the rows."""


class Equalizer(NamedTuple):
    """Factors of the input channels: X D^-1 and W D have the product of X and W."""

    d: Tensor
    """[K] float32, powers of two."""
    inverse: Tensor
    """1/d, exact."""

    @staticmethod
    def of(d: Tensor) -> Equalizer:
        """From the factors, [K] powers of two."""
        return Equalizer(d, 1 / d)

    @staticmethod
    def of_exponents(exponent: Tensor) -> Equalizer:
        """From log2 d, [K] int8."""
        return Equalizer(*ops.equalizer_factors(exponent))


def equalizer_exponents(x: Tensor, weight: Tensor) -> Tensor:
    """log2 of the equalisation factors d: d_k = 2^round(log2 sqrt(amax_k(X) / amax_k(W))) over its median.

    Channels in which X or W is all zero or not finite get d_k = 1. Powers of two make X D^-1 and W D exact.

    Args:
        x: [M, K]; weight: [N, K].

    Returns:
        [K] int8.
    """
    return exponents_of_amax(column_amax(x), column_amax(weight))


def column_amax(x: Tensor) -> Tensor:
    """[K] float32, the largest magnitude of each column of x [M, K]; zeros if there are no rows."""
    return x.abs().amax(dim=0).float() if x.shape[0] else x.new_zeros(x.shape[1], dtype=torch.float32)


def exponents_of_amax(x_amax: Tensor, w_amax: Tensor) -> Tensor:
    """:func:`equalizer_exponents` from the column_amax of X and of W."""
    ratio = x_amax / w_amax
    usable = torch.isfinite(ratio) & (ratio > 0)
    exponent = torch.where(usable, torch.round(0.5 * torch.log2(ratio)), torch.nan)
    centred = torch.nan_to_num(exponent - torch.nanmedian(exponent), nan=0.0)
    return centred.clamp(-_MAX_EXPONENT, _MAX_EXPONENT).to(torch.int8)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, ops.check_input("quantize", x))
