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
    rounded_input: RoundedInput | None = None,
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
        rounded_input: what :func:`round_input` returned for this x, equalizer and config, under the same autocast; the
            products use it and the values of ``x`` are not read. None rounds x here.

    Returns:
        [..., N] in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: integer or complex x, last dimension other than K, dtypes of x and weight that differ outside
            autocast, equalizer, quantized_weight or rounded_input of another shape.
    """
    if isinstance(equalizer, Tensor):
        equalizer = Equalizer.of(equalizer)
    _check(x, weight, equalizer, quantized_weight, rounded_input)
    if config.format is Format.HIGH_PRECISION or x.numel() == 0:
        return F.linear(x, weight, bias)
    target = autocast_dtype(x)
    if target is None and x.dtype != weight.dtype:
        raise ValueError(
            f"halo_linear: x and weight must have the same dtype outside autocast; got {x.dtype} and {weight.dtype}; cast "
            "one of them or run under torch.autocast"
        )
    # Apart, because an autograd Function sees tensors, not tuples of them.
    operands = (weight, bias, *(equalizer or (None, None)), config, *(quantized_weight or (None, None)))
    with nullcontext() if target is None else _without_autocast(x.device.type):
        if rounded_input is not None:
            return HaloLinearFunction.apply(
                rounded_input.carrier, *operands, *rounded_input.quantized, x.shape[:-1]
            )
        return HaloLinearFunction.apply(x if target is None else x.to(target), *operands, None, None, None)


class RoundedInput(NamedTuple):
    """X rounded for several layers; see :func:`round_input`."""

    carrier: Tensor
    """[M', K'] in the dtype of the products, without memory: where autograd sums their dX, rotated and padded as they are."""
    quantized: Quantized
    """(X D^-1) H rounded: data [M', K'] and its scales."""


def round_input(x: Tensor, config: HaloConfig, equalizer: Equalizer | None = None) -> RoundedInput:
    """Rounds x for all the layers that read it with the same d, for ``halo_linear(rounded_input=)``.

    Differentiable in x: dX of the layers are summed first, and rotated and equalised back once.

    Args:
        x: [..., K], not empty; as in :func:`halo_linear`.
        config: format, scaling and rotate_k must be those of the layers.
        equalizer: that of the layers.
    """
    ops.check_input("round_input", x)
    target = autocast_dtype(x)
    with nullcontext() if target is None else _without_autocast(x.device.type):
        carrier, data, scale = RoundInputFunction.apply(
            x if target is None else x.to(target), None if equalizer is None else equalizer.inverse, config
        )
    return RoundedInput(carrier, Quantized(data, scale))


class RoundInputFunction(torch.autograd.Function):
    """Carrier, data and scales, see :class:`RoundedInput`, from x [..., K], 1/d [K] or None, and config. Saves 1/d only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inverse: Tensor | None, config: HaloConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        data, scale = quantize_input(_matrix(x), inverse, config)
        ctx.mark_non_differentiable(data, scale)
        ctx.set_materialize_grads(False)  # they would be as large as x
        # Not through save_for_backward: a checkpoint counts what a layer saves, and only one of those that share calls this.
        ctx.inverse, ctx.block, ctx.x_shape = inverse, _block(data.shape[1], config), x.shape
        return x.new_empty_strided(data.shape, (0, 0)), data, scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if dx is None:
            return None, None, None
        if ctx.block > 1 or ctx.inverse is not None:
            # Not in place: autograd may have handed the sum to a hook.
            factors = None if ctx.inverse is None else _pad_vector(ctx.inverse, dx.shape[1])
            dx = ops.hadamard(dx, ctx.block, 1.0 / math.sqrt(ctx.block), None, factors)
        k = ctx.x_shape[-1]
        return _crop(dx, ctx.x_shape.numel() // k, k).reshape(ctx.x_shape), None, None


class Operands(NamedTuple):
    """The rounded operands of a layer's forward, padded: X [M', K'] and W [N', K'], rotated along K'."""

    x: Quantized
    w: Quantized
    block: int
    """Order of the rotation along K'; 1 is none."""


class HaloLinearFunction(torch.autograd.Function):
    """Y [..., N] from x [..., K], weight [N, K], bias [N] or None, d and 1/d [K] or None twice, config, the weight as
    :func:`quantize_weight` rounds it, or None twice. Then None three times; or data and scale of a :class:`RoundedInput`, whose
    carrier [M', K'] is x and gets its gradient rotated and padded as it is, and the leading shape of Y.

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
        x_data: Tensor | None,
        x_scale: Tensor | None,
        leading: torch.Size | None,
    ) -> Tensor:
        equalizer = None if d is None or inverse is None else Equalizer(d, inverse)
        quantized_weight = None if w_data is None or w_scale is None else Quantized(w_data, w_scale)
        quantized_input = None if x_data is None or x_scale is None else Quantized(x_data, x_scale)
        n, tokens = weight.shape[0], _matrix(x)
        op = quantize_operands(tokens, weight, equalizer, config, quantized_weight, quantized_input)
        m = tokens.shape[0] if leading is None else leading.numel()
        y = _crop(matmul(op.x, op.w, x.dtype, config.fast_accum), m, n)
        if bias is not None:
            y = y + bias.to(y.dtype)

        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        # With row scales dgrad needs t and wgrad needs s; s and t are saved with the data they belong to.
        saved_x = (op.x.data, op.x.scale, d) if needs_dw else (None, None, None)
        saved_w = (op.w.data, op.w.scale, inverse) if needs_dx else (None, None, None)
        ctx.save_for_backward(*saved_x, *saved_w)
        ctx.config, ctx.block, ctx.from_carrier = config, op.block, quantized_input is not None
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
        return y.view(*(x.shape[:-1] if leading is None else leading), n)

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
                if ctx.from_carrier:
                    dx = _crop(dx, *ctx.x_shape)
                else:
                    dx = _crop(_undo_k(dx, ctx.block, inverse), e.shape[0], k).reshape(ctx.x_shape)
            if for_dw is not None:
                dw = matmul(for_dw, _contract_rows(x, config), ctx.weight_dtype, config.fast_accum)
                dw = _crop(_undo_k(dw, ctx.block, d), n, k)
            if needs_db:
                wide = torch.promote_types(e.dtype, torch.float32)
                db = (e.sum(0, dtype=wide) if sums is None else sums[:n]).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None, None, None, None


def quantize_operands(
    x: Tensor,
    weight: Tensor,
    equalizer: Equalizer | None,
    config: HaloConfig,
    quantized_weight: Quantized | None = None,
    quantized_input: Quantized | None = None,
) -> Operands:
    """Pads, equalises, rotates and rounds X [M, K] and W [N, K], unless they are given rounded (docs/numerics.md, eq. 3)."""
    d, inverse = equalizer or (None, None)
    return Operands(
        quantize_input(x, inverse, config) if quantized_input is None else quantized_input,
        quantize_weight(weight, d, config) if quantized_weight is None else quantized_weight,
        _block(weight.shape[1], config),
    )


def quantize_input(x: Tensor, inverse: Tensor | None, config: HaloConfig) -> Quantized:
    """(X D^-1) H rounded, the first operand of fprop: X [M, K] padded to multiples of 16, to data [M', K']."""
    return _quantize_rows(x, inverse, config)


def quantize_weight(weight: Tensor, d: Tensor | None, config: HaloConfig) -> Quantized:
    """(W D) H rounded, the second operand of fprop: W [N, K] padded to multiples of 16, to data [N', K'].

    With row scales a row depends on no other: rows rounded apart, as the shards of FSDP2 are, have the same bits.
    """
    return _quantize_rows(weight, d, config)


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


def _quantize_rows(a: Tensor, factors: Tensor | None, config: HaloConfig) -> Quantized:
    a = _pad(a, MULTIPLE, MULTIPLE)
    factors = None if factors is None else _pad_vector(factors, a.shape[1])
    block = _block(a.shape[1], config)
    return quantize(a, config.format, scaling=config.scaling, block=block, col_scale=factors)


def _block(k: int, config: HaloConfig) -> int:
    return largest_block(k + -k % MULTIPLE) if config.rotate_k else 1


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x before the products, or None outside autocast; float64 stays."""
    device = x.device.type
    if not _autocast_enabled(device):
        return None
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


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
    x: Tensor,
    weight: Tensor,
    equalizer: Equalizer | None,
    quantized_weight: Quantized | None,
    rounded_input: RoundedInput | None,
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
    if rounded_input is not None and x.numel():
        padded = tuple(n + -n % MULTIPLE for n in (x.numel() // k, k))
        if tuple(rounded_input.quantized.data.shape) != padded:
            raise ValueError(
                f"halo_linear: rounded_input must have data of shape {padded}, x as a matrix padded to multiples of {MULTIPLE}; "
                f"got {tuple(rounded_input.quantized.data.shape)}; make it with round_input from this x"
            )
