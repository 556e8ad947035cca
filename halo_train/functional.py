"""The differentiable 8-bit linear map: one autograd Function, driven by a HaloConfig.

Symbols and equations: docs/numerics.md. In short, with (X D^-1) H = diag(s) Xq and (W D) H = diag(t) Wq::

    fprop   Y  = diag(s) (Xq Wq^T) diag(t)
    dgrad   Ea, u = rows of E diag(t);      dX = diag(u) (Ea Wq) H^T D^-1
    wgrad   Eb, v = rows of (diag(s) E)^T;  dW = diag(v) (Eb Xq) H^T D
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import Format, HaloConfig, Scaling
from .gemm import MULTIPLE, matmul
from .hadamard import hadamard_transform, largest_block
from .quantize import Equalizer, Quantized, quantize, quantize_grad, quantize_transposed

_MIN_TOKEN_BLOCK = 256
"""A rotation along M spreads an outlier token over at least this many tokens; shorter axes are padded with zeros."""

_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)
"""Asked once: torch.compile cannot trace the question before torch 2.12."""


def halo_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: HaloConfig,
    equalizer: Tensor | Equalizer | None = None,
    quantized_weight: Quantized | None = None,
) -> Tensor:
    """y = x W^T + bias with the three products in 8 bits.

    Under autocast x is cast to the autocast dtype, which is that of y; the weight is rounded to 8 bits from its own
    dtype. Any M, N, K: operands are padded to multiples of 16 inside.

    Args:
        x: [..., K], bfloat16, float16, float32 or float64.
        weight: [N, K]; bias: [N] or None.
        config: formats, scales and rotations; ``format='high_precision'`` is torch.nn.functional.linear.
        equalizer: d [K], powers of two, or an :class:`Equalizer` of it, or None for ones.
        quantized_weight: what :func:`quantize_weight` returned for this weight, equalizer and config; the products use it
            and the values of ``weight`` are not read. None rounds the weight here.

    Returns:
        [..., N] in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: integer or complex x, last dimension other than K, dtypes of x and weight that differ outside
            autocast, equalizer or quantized_weight of another shape.
    """
    if isinstance(equalizer, Tensor):
        equalizer = Equalizer.of(equalizer)
    _check(x, weight, equalizer, quantized_weight)
    if config.format is Format.HIGH_PRECISION or x.numel() == 0:
        return F.linear(x, weight, bias)
    # Apart, because an autograd Function sees tensors, not tuples of them.
    operands = (weight, bias, *(equalizer or (None, None)), config, *(quantized_weight or (None, None)))
    device = x.device.type
    if _autocast_enabled(device):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with _without_autocast(device):
            return HaloLinearFunction.apply(x, *operands)
    if x.dtype != weight.dtype:
        raise ValueError(
            f"halo_linear: x and weight must have the same dtype outside autocast; got {x.dtype} and {weight.dtype}; cast "
            "one of them or run under torch.autocast"
        )
    return HaloLinearFunction.apply(x, *operands)


class Operands(NamedTuple):
    """The rounded operands of a layer's forward, padded: X [M', K'] and W [N', K'], rotated along K'."""

    x: Quantized
    w: Quantized
    block: int
    """Order of the rotation along K'; 1 is none."""


class HaloLinearFunction(torch.autograd.Function):
    """Y [..., N] from x [..., K], weight [N, K], bias [N] or None, d and 1/d [K] or None twice, config, and the weight as
    :func:`quantize_weight` rounds it, or None twice.

    Saved for backward: Xq (1 byte an element), its scales s and d when the weight needs a gradient, Wq, its scales t and
    1/d when x does. The padding is part of Xq and Wq; it is zero and adds nothing to a sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        d: Tensor | None,
        inverse: Tensor | None,
        config: HaloConfig,
        w_data: Tensor | None,
        w_scale: Tensor | None,
    ) -> Tensor:
        equalizer = None if d is None or inverse is None else Equalizer(d, inverse)
        quantized_weight = None if w_data is None or w_scale is None else Quantized(w_data, w_scale)
        n, tokens = weight.shape[0], _matrix(x)
        op = quantize_operands(tokens, weight, equalizer, config, quantized_weight)
        y = _crop(matmul(op.x, op.w, x.dtype, config.fast_accum), tokens.shape[0], n)
        if bias is not None:
            y = y + bias.to(y.dtype)

        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        # With row scales dgrad needs t and wgrad needs s; s and t are saved with the data they belong to.
        saved_x = (op.x.data, op.x.scale, d) if needs_dw else (None, None, None)
        saved_w = (op.w.data, op.w.scale, inverse) if needs_dx else (None, None, None)
        ctx.save_for_backward(*saved_x, *saved_w)
        ctx.config, ctx.block = config, op.block
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
        return y.view(*x.shape[:-1], n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        x_data, x_scale, d, w_data, w_scale, inverse = ctx.saved_tensors
        config, (n, k) = ctx.config, ctx.weight_shape
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        x, w = Quantized(x_data, x_scale), Quantized(w_data, w_scale)
        e = _matrix(e)
        # A compiled backward is traced under the autocast of its forward; the products have their own dtypes.
        with _without_autocast(e.device.type):
            padded = _pad(e, MULTIPLE, MULTIPLE)
            for_dx, for_dw, sums = _round_grad(padded, x, w, needs_dx, needs_dw, needs_db, config)
            dx = dw = db = None
            if for_dx is not None:
                dx = matmul(for_dx, _contract_rows(w, config), ctx.x_dtype, config.fast_accum)
                if config.rotate_m_dgrad:
                    dx = hadamard_transform(dx, axis=0)
                dx = _crop(_undo_k(dx, ctx.block, inverse), e.shape[0], k).reshape(ctx.x_shape)
            if for_dw is not None:
                dw = matmul(for_dw, _contract_rows(x, config), ctx.weight_dtype, config.fast_accum)
                dw = _crop(_undo_k(dw, ctx.block, d), n, k)
            if needs_db:
                wide = torch.promote_types(e.dtype, torch.float32)
                db = (e.sum(0, dtype=wide) if sums is None else sums[:n]).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None


def quantize_operands(
    x: Tensor,
    weight: Tensor,
    equalizer: Equalizer | None,
    config: HaloConfig,
    quantized_weight: Quantized | None = None,
) -> Operands:
    """Pads, equalises, rotates and rounds X [M, K] and, unless it is given rounded, W [N, K] (docs/numerics.md, eq. 3)."""
    x = _pad(x, MULTIPLE, MULTIPLE)
    block = largest_block(x.shape[1]) if config.rotate_k else 1
    d, inverse = equalizer or (None, None)
    factors = None if inverse is None else _pad_vector(inverse, x.shape[1])
    return Operands(
        quantize(x, config.format, scaling=config.scaling, block=block, col_scale=factors),
        quantize_weight(weight, d, config) if quantized_weight is None else quantized_weight,
        block,
    )


def quantize_weight(weight: Tensor, d: Tensor | None, config: HaloConfig) -> Quantized:
    """(W D) H rounded, the second operand of fprop: W [N, K] padded to multiples of 16, to data [N', K'].

    With row scales a row depends on no other: rows rounded apart, as the shards of FSDP2 are, have the same bits.
    """
    weight = _pad(weight, MULTIPLE, MULTIPLE)
    block = largest_block(weight.shape[1]) if config.rotate_k else 1
    factors = None if d is None else _pad_vector(d, weight.shape[1])
    return quantize(weight, config.format, scaling=config.scaling, block=block, col_scale=factors)


def quantize_grad_for_dgrad(e: Tensor, w_scale: Tensor, config: HaloConfig) -> Quantized:
    """E [M', N'] rounded for dgrad: rows of E diag(t), or the whole E with one scale (rotated along M for HALO-2)."""
    if config.scaling is Scaling.ROWWISE:
        if config.rotate_m_dgrad:
            e = hadamard_transform(e.to(torch.promote_types(e.dtype, torch.float32)), axis=0)
        return quantize(e, config.grad_format, col_scale=w_scale)
    block = largest_block(e.shape[0]) if config.rotate_m_dgrad else 1
    q = quantize(e.t() if block > 1 else e, config.grad_format, scaling=Scaling.TENSORWISE, block=block)
    return Quantized(q.transposed_data(), q.scale) if block > 1 else q


def quantize_grad_for_wgrad(e: Tensor, x_scale: Tensor, config: HaloConfig) -> Quantized:
    """E [M', N'] rounded and transposed for wgrad: rows of (diag(s) E)^T, or the whole E^T with one scale."""
    if config.scaling is Scaling.ROWWISE:
        return quantize_transposed(e, config.grad_format, x_scale)
    q = quantize(e, config.grad_format, scaling=Scaling.TENSORWISE)
    return Quantized(q.transposed_data(), q.scale)


def _round_grad(
    e: Tensor, x: Quantized, w: Quantized, needs_dx: bool, needs_dw: bool, needs_db: bool, config: HaloConfig
) -> tuple[Quantized | None, Quantized | None, Tensor | None]:
    """E [M', N'] rounded for dgrad and for wgrad, each only if it is needed; its column sums where they cost no pass."""
    if needs_dx and needs_dw and not config.rotate_m_dgrad:
        if config.scaling is Scaling.ROWWISE:
            return quantize_grad(e, config.grad_format, w.scale, x.scale, column_sums=needs_db)
        q = quantize(e, config.grad_format, scaling=Scaling.TENSORWISE)
        return q, Quantized(q.transposed_data(), q.scale), None
    for_dx = for_dw = None
    if needs_dx:
        for_dx = quantize_grad_for_dgrad(pad_tokens(e) if config.rotate_m_dgrad else e, w.scale, config)
    if needs_dw:
        for_dw = quantize_grad_for_wgrad(e, x.scale, config)
    return for_dx, for_dw, None


def _contract_rows(q: Quantized, config: HaloConfig) -> Quantized:
    """The transpose of q as the second operand of a product over its rows, both operands contiguous along them.

    Row scales lie on the contracted axis, where a GEMM cannot apply them: they are folded into the other operand.
    """
    data = q.transposed_data()
    scale = q.scale.new_ones(data.shape[0]) if config.scaling is Scaling.ROWWISE else q.scale
    return Quantized(data, scale)


def _autocast_enabled(device: str) -> bool:
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # What is traced may run under another autocast than it is traced under.
    needed = torch.compiler.is_compiling() or _autocast_enabled(device)
    return torch.autocast(device, enabled=False) if needed and device in _AUTOCAST_DEVICES else nullcontext()


def _undo_k(grad: Tensor, block: int, col_scale: Tensor | None) -> Tensor:
    """grad H^T diag(col_scale) for a product [rows, K'] that nothing else uses: in place, rounded once."""
    if block > 1 or col_scale is not None:
        factors = None if col_scale is None else _pad_vector(col_scale, grad.shape[1])
        ops.hadamard_(grad, block, 1.0 / math.sqrt(block), None, factors)
    return grad


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    extra = (-x.shape[0] % rows, -x.shape[1] % columns)
    return F.pad(x, (0, extra[1], 0, extra[0])) if any(extra) else x


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _crop(x: Tensor, rows: int, columns: int) -> Tensor:
    return x if x.shape == (rows, columns) else x[:rows, :columns]


def pad_tokens(e: Tensor) -> Tensor:
    """E with zero tokens appended where its M is too odd for a rotation along M."""
    m = e.shape[0]
    if largest_block(m) >= _MIN_TOKEN_BLOCK:
        return e
    return _pad(e, min(_MIN_TOKEN_BLOCK, 1 << (m - 1).bit_length()), 1)


def _pad_vector(v: Tensor, n: int) -> Tensor:
    return F.pad(v, (0, n - v.shape[0]), value=1.0) if v.shape[0] < n else v


def _check(
    x: Tensor, weight: Tensor, equalizer: Equalizer | None, quantized_weight: Quantized | None
) -> None:
    ops.check_input("halo_linear", x)
    k = weight.shape[1]
    if x.shape[-1] != k:
        raise ValueError(
            f"halo_linear: the last dimension of x must be in_features={k}; got shape {tuple(x.shape)}; reshape x or use a "
            "layer of that width"
        )
    if equalizer is not None and tuple(equalizer.d.shape) != (k,):
        raise ValueError(f"halo_linear: equalizer must have shape ({k},); got {tuple(equalizer.d.shape)}")
    padded = tuple(n + -n % MULTIPLE for n in weight.shape)
    if quantized_weight is not None and tuple(quantized_weight.data.shape) != padded:
        raise ValueError(
            f"halo_linear: quantized_weight must have data of shape {padded}, the weight padded to multiples of {MULTIPLE}; got "
            f"{tuple(quantized_weight.data.shape)}; make it with quantize_weight"
        )
