"""The rounded operands of a layer's three products, padded, rotated, equalised and folded as its HaloConfig says.

Symbols and equations: docs/numerics.md. In short, with (X D^-1) H = diag(s) Xq and (W D) H = diag(t) Wq::

    fprop   Xq, s and Wq, t
    dgrad   Ea, u = rows of E,  Wc, c = rows of W^T;  int8: of E diag(l) and of (diag(1/l) W)^T;  folded: Ea, u = rows of E diag(t),  Wq^T
    wgrad   Eb, v = rows of (diag(s) E)^T,  Xq^T;  in blocks:  Xc = rows of (diag(1/s) X)^T
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import HaloConfig, Scaling, storage_dtype
from .gemm import MULTIPLE, scale_of_columns
from .hadamard import hadamard_transform, largest_block
from .quantize import (
    Quantized,
    RoundedWeight,
    quantize,
    quantize_grad,
    quantize_grad_blocks,
    quantize_tiles,
    quantize_transposed,
)

_MIN_TOKEN_BLOCK = 256
"""A rotation along M spreads an outlier token over at least this many tokens; shorter axes are padded with zeros."""


def quantize_input(x: Tensor, inverse: Tensor | None, config: HaloConfig) -> Quantized:
    """(X D^-1) H rounded, the first operand of fprop: X [M, K] padded to multiples of 16, to data [M', K']."""
    return _quantize_rows(x, inverse, config)


def quantize_weight(weight: Tensor, d: Tensor | None, config: HaloConfig) -> Quantized:
    """(W D) H rounded, the second operand of fprop: W [N, K] padded to multiples of 16, to data [N', K'].

    With row scales a row depends on no other: rows rounded apart, as the shards of FSDP2 are, have the same bits.
    """
    return _quantize_rows(weight, d, config)


def makes_both(x: Tensor, weight: Tensor) -> bool:
    """Whether the backward of a forward that runs now makes dX and dW, and rounds E for both at once."""
    return torch.is_grad_enabled() and x.requires_grad and weight.requires_grad


def takes_input_columns(x: Tensor, out_features: int, config: HaloConfig) -> bool:
    """Whether wgrad takes :func:`quantize_input_columns` of X [..., K] in place of the rotated rows of fprop, so that nothing is undone on
    dW; of a layer that :func:`makes_both`.

    It takes scales for blocks, and pays where what X costs, a byte an element more than to transpose its rows, is no more than the 4
    bytes an element of dW.

    Args:
        out_features: N, of layers that have the columns made once the sum; 0 where none can be made.
    """
    undone = config.rotate_k or config.equalize
    tokens = x.numel() // x.shape[-1]
    return undone and tokens <= 4 * out_features and rounds_in_blocks(x, config)


def quantize_input_columns(x: Tensor, scale: Tensor, config: HaloConfig) -> Quantized:
    """(diag(1/scale) X)^T rounded, the second operand of a wgrad by columns: X [M, K] padded to multiples of 16, to data [K', M'] with a
    scale for each tile, neither rotated nor equalised.

    Args:
        scale: of the rows of :func:`quantize_input`, which E is multiplied by.
    """
    return quantize_tiles(pad_matrix(x, MULTIPLE, MULTIPLE), config.format, scale)


def levels_of(scale: Tensor, config: HaloConfig) -> Tensor | None:
    """What the rows of W are divided by for dgrad, and the columns of E multiplied, if the config has such levels: l [N'].

    The square roots of the row scales t of W: roots, because nothing is known here of E, whose columns may be small, large or neither
    where the rows of W are large.
    """
    return scale.sqrt() if config.levels_w_dgrad else None


def quantize_weight_columns(
    weight: Tensor, levels: Tensor | None, config: HaloConfig, in_tiles: bool
) -> Quantized:
    """(diag(1/levels) W)^T rounded, the second operand of a dgrad that requantizes W: W [N, K] padded to multiples of 16, to data
    [K', N'].

    Args:
        in_tiles: with a scale for each tile, in one read of W, not a column; for E with scales for blocks.
    """
    padded = pad_matrix(weight, MULTIPLE, MULTIPLE)
    if in_tiles:
        return quantize_tiles(padded, config.format)
    return quantize_transposed(padded, config.format, None if levels is None else levels.reciprocal())


def round_weight(weight: Tensor, d: Tensor | None, config: HaloConfig) -> RoundedWeight:
    """W [N, K] in the forms that the three products of ``config`` take, for ``halo_linear(rounded_weight=)``.

    Where E has scales for blocks, the columns of a W that requires a gradient have scales for tiles, as in backward. For W that is not
    trained E is rounded for dgrad alone, with a scale a row, and W but once.
    """
    rows, columns = quantize_weight(weight, d, config), None
    if config.requantize_w_dgrad:
        in_tiles = weight.requires_grad and rounds_in_blocks(weight, config)
        columns = quantize_weight_columns(weight, levels_of(rows.scale, config), config, in_tiles)
    return RoundedWeight(rows, columns)


def quantize_grad_for_dgrad(e: Tensor, fold: Tensor | None, config: HaloConfig) -> Quantized:
    """E [M', N'] rounded for dgrad: rows of E diag(fold), or the whole E with one scale (rotated along M for HALO-2).

    Args:
        fold: what its columns are multiplied by [N'], or None: the row scales t of W in a folded dgrad, the levels l in one that
            has them.
    """
    if config.scaling is Scaling.ROWWISE:
        if config.rotate_m_dgrad:
            e = hadamard_transform(e.to(torch.promote_types(e.dtype, torch.float32)), axis=0)
        return quantize(e, config.grad_format, col_scale=fold)
    block = largest_block(e.shape[0]) if config.rotate_m_dgrad else 1
    q = quantize(e.t() if block > 1 else e, config.grad_format, scaling=Scaling.TENSORWISE, block=block)
    return Quantized(q.transposed_data(), q.scale) if block > 1 else q


def quantize_grad_for_wgrad(e: Tensor, x_scale: Tensor, config: HaloConfig) -> Quantized:
    """E [M', N'] rounded and transposed for wgrad: rows of (diag(s) E)^T, or the whole E^T with one scale."""
    if config.scaling is Scaling.ROWWISE:
        return quantize_transposed(e, config.grad_format, x_scale)
    q = quantize(e, config.grad_format, scaling=Scaling.TENSORWISE)
    return Quantized(q.transposed_data(), q.scale)


def round_grad(
    e: Tensor,
    fold: Tensor | None,
    x_scale: Tensor | None,
    needs_dx: bool,
    needs_dw: bool,
    needs_db: bool,
    config: HaloConfig,
    in_tiles: bool = False,
) -> tuple[Quantized | None, Quantized | None, Tensor | None]:
    """E [M', N'] rounded for dgrad and for wgrad, each only if it is needed; its column sums where they cost no pass.

    Args:
        in_tiles: dgrad's W or wgrad's X has a scale for each tile, so that E must have some for blocks.
    """
    if in_tiles and needs_dx != needs_dw:  # what is not needed is thrown away
        factors = e.new_ones(e.shape[0], dtype=torch.float32) if x_scale is None else x_scale
        rows, columns, _ = quantize_grad_blocks(e, config.grad_format, fold, factors)
        return (rows, None, None) if needs_dx else (None, columns, None)
    if needs_dx and needs_dw and not config.rotate_m_dgrad:
        assert x_scale is not None
        if config.scaling is Scaling.ROWWISE:
            rounding = quantize_grad_blocks if rounds_in_blocks(e, config) else quantize_grad
            return rounding(e, config.grad_format, fold, x_scale, column_sums=needs_db)
        q = quantize(e, config.grad_format, scaling=Scaling.TENSORWISE)
        return q, Quantized(q.transposed_data(), q.scale), None
    for_dx = for_dw = None
    if needs_dx:
        for_dx = quantize_grad_for_dgrad(pad_tokens(e) if config.rotate_m_dgrad else e, fold, config)
    if needs_dw:
        assert x_scale is not None
        for_dw = quantize_grad_for_wgrad(e, x_scale, config)
    return for_dx, for_dw, None


def rounds_in_blocks(e: Tensor, config: HaloConfig) -> bool:
    """Whether E, where it is rounded for dgrad and wgrad at once, gets a scale for each row and block of the contraction, and W of such
    a dgrad one for each tile. Both are read once then, not twice.

    Args:
        e: E, W or X.
    """
    return config.allows_blocks and ops.takes_blocks(e)


def contract_rows(q: Quantized) -> Quantized:
    """The transpose of q as the second operand of a product over its rows, both operands contiguous along them.

    Row scales lie on the contracted axis, where a GEMM cannot apply them: they are folded into the other operand.
    """
    return Quantized(q.transposed_data(), scale_of_columns(q))


def rotation_block(k: int, config: HaloConfig) -> int:
    return largest_block(k + -k % MULTIPLE) if config.rotate_k else 1


def pad_matrix(x: Tensor, rows: int, columns: int) -> Tensor:
    m, n = x.shape
    below, right = -m % rows, -n % columns
    return F.pad(x, (0, right, 0, below)) if below or right else x


def pad_rows(q: Quantized) -> Quantized:
    """A rounded W [N, K'] with its rows padded to a multiple of 16 as :func:`quantize_weight` pads them: zeros, with scale 1."""
    missing = -q.data.shape[0] % MULTIPLE
    if not missing:
        return q
    data = F.pad(q.data.view(torch.uint8), (0, 0, 0, missing)).view(q.data.dtype)
    return Quantized(data, F.pad(q.scale, (0, missing), value=1.0))


def pad_tokens(e: Tensor) -> Tensor:
    """E with zero tokens appended where its M is too odd for a rotation along M."""
    m = e.shape[0]
    if largest_block(m) >= _MIN_TOKEN_BLOCK:
        return e
    return pad_matrix(e, min(_MIN_TOKEN_BLOCK, 1 << (m - 1).bit_length()), 1)


def pad_vector(v: Tensor, n: int) -> Tensor:
    return F.pad(v, (0, n - v.shape[0]), value=1.0) if v.shape[0] < n else v


def _quantize_rows(a: Tensor, factors: Tensor | None, config: HaloConfig) -> Quantized:
    a = pad_matrix(a, MULTIPLE, MULTIPLE)
    k = a.shape[1]
    factors = None if factors is None else pad_vector(factors, k)
    rounding = ops.quantize_tensor if config.scaling is Scaling.TENSORWISE else ops.quantize_rows
    return Quantized(*rounding(a, storage_dtype(config.format, a.dtype), rotation_block(k, config), factors))
