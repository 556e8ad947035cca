"""The differentiable 8-bit linear map: one autograd Function, driven by a HaloConfig.

Symbols and equations: docs/numerics.md. In short, with (X D^-1) H = diag(s) Xq and (W D) H = diag(t) Wq::

    fprop   Y  = diag(s) (Xq Wq^T) diag(t)
    dgrad   Ea, u = rows of E;              dX = diag(u) (Ea Wc^T) diag(c)      Wc, c = rows of W^T
    wgrad   Eb, v = rows of (diag(s) E)^T;  dW = diag(v) (Eb Xq) H^T D
                        or, by columns,  dW = diag(v) (Eb Xc^T)         Xc = rows of (diag(1/s) X)^T

or, where W is rounded once only, the *folded* dgrad::

            Ea, u = rows of E diag(t);      dX = diag(u) (Ea Wq) H^T D^-1
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import Format, HaloConfig
from .gemm import MULTIPLE
from .hadamard import hadamard_transform
from .operands import (
    makes_both,
    pad_vector,
    quantize_input,
    quantize_input_columns,
    rotation_block,
    takes_input_columns,
)
from .products import (
    ForDgrad,
    ForWgrad,
    after,
    again,
    as_matrix,
    as_output,
    autocast_dtype,
    crop,
    dgrad,
    for_dgrad,
    for_wgrad,
    fprop,
    gradients,
    in_one_call,
    once_differentiable,
    round_and_multiply,
    round_gradient,
    undo_fold,
    wgrad,
    without_autocast,
)
from .quantize import Equalizer, Quantized, RoundedWeight


def halo_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: HaloConfig,
    equalizer: Tensor | Equalizer | None = None,
    rounded_weight: RoundedWeight | None = None,
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
        rounded_weight: what :func:`round_weight` returned for this weight, equalizer and config; the products use it
            and the values of ``weight`` are not read. None rounds the weight here: for fprop, and again in backward where
            dgrad requantizes it.
        rounded_input: what :func:`round_input` returned for this x, equalizer and config, under the same autocast; the
            products use it and the values of ``x`` are not read. None rounds x here.

    Returns:
        [..., N] in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: integer or complex x, last dimension other than K, dtypes of x and weight that differ outside
            autocast, equalizer, rounded_weight or rounded_input of another shape or for another form of dgrad.
    """
    if isinstance(equalizer, Tensor):
        equalizer = Equalizer.of(equalizer)
    _check(x, weight, config, equalizer, rounded_weight, rounded_input)
    if config.format is Format.HIGH_PRECISION or x.numel() == 0:
        return F.linear(x, weight, bias)
    target = autocast_dtype(x)
    if target is None and x.dtype != weight.dtype:
        raise ValueError(
            f"halo_linear: x and weight must have the same dtype outside autocast; got {x.dtype} and {weight.dtype}; cast "
            "one of them or run under torch.autocast"
        )
    d, inverse = equalizer or (None, None)
    carrier = None
    by_columns = makes_both(x, weight) and (
        takes_input_columns(x, weight.shape[0], config)
        if rounded_input is None
        else rounded_input.columns is not None
    )
    # Apart, because an autograd Function sees tensors, not tuples of them; and only if there are any, because it looks at each.
    rounded: tuple[Any, ...] = ()
    if rounded_weight is not None or rounded_input is not None:
        rows, columns = rounded_weight or (None, None)
        rounded = (*(rows or (None, None)), *(columns or (None, None)))
    if rounded_input is not None:
        of_x = (*rounded_input.quantized, *(rounded_input.columns or (None, None)))
        carrier, rounded = rounded_input.carrier, (*rounded, *of_x, x.shape[:-1])
    if target is None:
        return HaloLinearFunction.apply(
            x if carrier is None else carrier, weight, bias, d, inverse, config, by_columns, *rounded
        )
    with without_autocast(x.device.type):
        return HaloLinearFunction.apply(
            x.to(target) if carrier is None else carrier,
            *(weight, bias, d, inverse, config, by_columns, *rounded),
        )


class RoundedInput(NamedTuple):
    """X rounded for several layers; see :func:`round_input`."""

    carrier: Tensor
    """[M', K'] in the dtype of the products, without memory: where autograd sums their dX, padded as they are, and rotated
    as they are where dgrad is folded."""
    quantized: Quantized
    """(X D^-1) H rounded: data [M', K'] and its scales."""
    folded_dgrad: bool
    """Whether the layers fold dgrad: dX of all of them is rotated, or of none."""
    columns: Quantized | None = None
    """What wgrad of layers takes in place of it, if they do: :func:`round_input_columns`."""


def round_input(x: Tensor, config: HaloConfig, equalizer: Equalizer | None = None) -> RoundedInput:
    """Rounds x for all the layers that read it with the same d, for ``halo_linear(rounded_input=)``.

    Differentiable in x: dX of the layers are summed first, and if they fold dgrad rotated and equalised back once.

    Args:
        x: [..., K], not empty; as in :func:`halo_linear`.
        config: format, scaling, rotate_k and requantize_w_dgrad must be those of the layers.
        equalizer: that of the layers.
    """
    ops.check_input("round_input", x)
    target = autocast_dtype(x)
    with nullcontext() if target is None else without_autocast(x.device.type):
        carrier, data, scale = RoundInputFunction.apply(
            x if target is None else x.to(target), None if equalizer is None else equalizer.inverse, config
        )
    return RoundedInput(carrier, Quantized(data, scale), not config.requantize_w_dgrad)


def round_input_columns(x: Tensor, rounded: RoundedInput, config: HaloConfig) -> RoundedInput:
    """The same with its columns, for layers whose wgrad takes them (:func:`halo_train.operands.takes_input_columns`).

    Args:
        x, config: those of :func:`round_input`, under the same autocast.
    """
    target = autocast_dtype(x)
    with torch.no_grad(), nullcontext() if target is None else without_autocast(x.device.type):
        tokens = as_matrix(x if target is None else x.to(target))
        return rounded._replace(columns=quantize_input_columns(tokens, rounded.quantized.scale, config))


class RoundInputFunction(torch.autograd.Function):
    """Carrier, data and scales, see :class:`RoundedInput`, from x [..., K], 1/d [K] or None, and config. Saves 1/d at most."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inverse: Tensor | None, config: HaloConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        data, scale = quantize_input(as_matrix(x), inverse, config)
        ctx.mark_non_differentiable(data, scale)
        ctx.set_materialize_grads(False)  # they would be as large as x
        ctx.x_shape, ctx.block, ctx.inverse = x.shape, 1, None
        if not config.requantize_w_dgrad:
            # Not through save_for_backward: a checkpoint counts what a layer saves, and only one of those that share calls this.
            ctx.block, ctx.inverse = rotation_block(data.shape[1], config), inverse
        return x.new_empty_strided(data.shape, (0, 0)), data, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if dx is None:
            return None, None, None
        if ctx.block > 1 or ctx.inverse is not None:
            # Not in place: autograd may have handed the sum to a hook.
            factors = None if ctx.inverse is None else pad_vector(ctx.inverse, dx.shape[1])
            dx = ops.hadamard(dx, ctx.block, 1.0 / math.sqrt(ctx.block), None, factors)
        k = ctx.x_shape[-1]
        return crop(dx, ctx.x_shape.numel() // k, k).reshape(ctx.x_shape), None, None


class HaloLinearFunction(torch.autograd.Function):
    """Y [..., N] from x [..., K], weight [N, K], bias [N] or None, d and 1/d [K] or None twice, config, whether wgrad takes columns of
    X, rows and columns of a :class:`RoundedWeight`, each data and scale or None twice. Then rows and columns, likewise, of a
    :class:`RoundedInput`, whose carrier [M', K'] is x and gets its gradient padded (and rotated) as it is, and the leading shape of
    Y. What is rounded here is left out.

    Saved for backward: Xq or the columns of X (1 byte an element; x itself if the config says so), their scales, s and d when the
    weight needs a gradient. When x does, what dgrad takes: the weight itself, which takes no memory, or its columns if they are given, in int8 with
    its levels; folded, Wq, its scales t and 1/d. The
    padding is part of Xq and Wq; it is zero and adds nothing to a sum.
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
        by_columns: bool,
        w_data: Tensor | None = None,
        w_scale: Tensor | None = None,
        wc_data: Tensor | None = None,
        wc_scale: Tensor | None = None,
        x_data: Tensor | None = None,
        x_scale: Tensor | None = None,
        xc_data: Tensor | None = None,
        xc_scale: Tensor | None = None,
        leading: torch.Size | None = None,
    ) -> Tensor:
        given = None if w_data is None or w_scale is None else Quantized(w_data, w_scale)
        quantized_input = None if x_data is None or x_scale is None else Quantized(x_data, x_scale)
        (n, k), tokens = weight.shape, as_matrix(x)
        block = rotation_block(k, config)
        again_from_x = config.recomputes_inputs and quantized_input is None
        columns_here = by_columns and not again_from_x
        if quantized_input is None and given is None:
            kept, y, w_rows, w_row_scale = round_and_multiply(
                tokens, inverse, weight, d, block, columns_here, x.dtype, config
            )
        else:
            rounded = quantized_input or quantize_input(tokens, inverse, config)
            if quantized_input is None:
                kept = for_wgrad(tokens, rounded, d, columns_here, config)
            else:
                kept = ForWgrad(xc_data, x_scale, xc_scale) if by_columns else ForWgrad(*rounded, None, d)
            y, w_rows, w_row_scale = fprop(rounded, weight, d, given, x.dtype, config)
        y = as_output(y, x.shape[:-1] if leading is None else leading, n)
        if bias is not None:
            y = y + bias.to(y.dtype)

        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        # Row scales are saved with the data they belong to: wgrad needs s, a folded dgrad t.
        if again_from_x:
            kept = ForWgrad(x, kept.scale, None, None if by_columns else d)
        saved_x = kept if needs_dw else ForWgrad()
        columns = None if wc_data is None or wc_scale is None else Quantized(wc_data, wc_scale)
        saved_w = ForDgrad()
        if needs_dx:
            saved_w = for_dgrad(weight, w_rows, w_row_scale, columns, config)
        needs_inverse = (again_from_x and not by_columns) or not config.requantize_w_dgrad
        ctx.save_for_backward(*saved_x, *saved_w, inverse if needs_inverse else None)
        ctx.config, ctx.block, ctx.from_carrier = (
            config,
            block,
            quantized_input is not None,
        )
        ctx.again_from_x, ctx.by_columns = again_from_x, by_columns
        ctx.x_dtype, ctx.x_shape, ctx.weight_form = x.dtype, x.shape, (weight.shape, weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        *saved, inverse = ctx.saved_tensors
        x, w = ForWgrad(*saved[:4]), ForDgrad(*saved[4:])
        config = ctx.config
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        bias_dtype, for_dw = ctx.bias_dtype if needs_db else None, None
        dx: Tensor | None = None
        dw: Tensor | None = None
        e = as_matrix(e)
        # A compiled backward is traced under the autocast of its forward.
        with without_autocast(e.device.type):
            rounds_here = w.weight is not None and needs_dw and not ctx.again_from_x
            if rounds_here and not config.rotate_m_dgrad and in_one_call(config):
                dx, dw, db = gradients(e, w, x, ctx.block, bias_dtype, ctx.x_dtype, config)
                dw = crop(dw, *ctx.weight_form[0])
            else:
                for_dx, for_dw, db = round_gradient(
                    e, w, x.scale, needs_dx, needs_dw, bias_dtype, config, ctx.by_columns
                )
                dx = None if for_dx is None else dgrad(for_dx, w, ctx.x_dtype, config)
            if dx is not None:
                if config.rotate_m_dgrad:
                    dx = hadamard_transform(dx, axis=0)
                if ctx.from_carrier:
                    dx = crop(dx, *ctx.x_shape)
                else:
                    dx = undo_fold(dx, ctx.block, inverse, config)
                    dx = crop(dx, e.shape[0], ctx.x_shape[-1])
                    dx = dx if len(ctx.x_shape) == 2 else dx.reshape(ctx.x_shape)
            if for_dw is not None:
                if ctx.again_from_x:
                    x = _round_again(x, inverse, e, ctx.by_columns, config)
                dw = wgrad(for_dw, x.quantized, ctx.block, x.d, ctx.weight_form, config, rows=True)
        return dx, dw, db, *(None,) * (len(ctx.needs_input_grad) - 3)


def _round_again(
    x: ForWgrad, inverse: Tensor | None, e: Tensor, by_columns: bool, config: HaloConfig
) -> ForWgrad:
    """What wgrad takes of X itself."""
    assert x.data is not None
    assert x.scale is not None
    tokens = as_matrix(x.data)
    if by_columns:
        data, tiles = quantize_input_columns(tokens, after(x.scale, e), config)
        return x._replace(data=data, tiles=tiles)
    return x._replace(data=quantize_input(tokens, again(inverse, tokens.shape[1], e), config).data)


def _check(
    x: Tensor,
    weight: Tensor,
    config: HaloConfig,
    equalizer: Equalizer | None,
    rounded_weight: RoundedWeight | None,
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
    if rounded_weight is not None:
        padded = tuple(n + -n % MULTIPLE for n in weight.shape)
        rows, columns = rounded_weight
        shapes = [tuple(rows.data.shape), None if columns is None else tuple(columns.data.shape)]
        wanted = (
            [[padded, padded[::-1]]]
            if config.requantize_w_dgrad
            else [[padded, None], [(weight.shape[0], padded[1]), None]]
        )
        if shapes not in wanted:
            raise ValueError(
                f"halo_linear: rounded_weight must have rows of shape {padded}, the weight padded to multiples of {MULTIPLE}, and "
                f"columns of the transposed shape if requantize_w_dgrad is set (here {config.requantize_w_dgrad}), else None; got "
                f"{shapes[0]} and {shapes[1]}; make it with round_weight, or use config.with_folded_dgrad"
            )
    if rounded_input is not None and rounded_input.folded_dgrad == config.requantize_w_dgrad:
        raise ValueError(
            f"halo_linear: rounded_input is for layers with requantize_w_dgrad={not rounded_input.folded_dgrad}; got a config with "
            f"{config.requantize_w_dgrad}; make it with round_input and the config of the layer"
        )
    if rounded_input is not None and x.numel():
        padded = tuple(n + -n % MULTIPLE for n in (x.numel() // k, k))
        if tuple(rounded_input.quantized.data.shape) != padded:
            raise ValueError(
                f"halo_linear: rounded_input must have data of shape {padded}, x as a matrix padded to multiples of {MULTIPLE}; "
                f"got {tuple(rounded_input.quantized.data.shape)}; make it with round_input from this x"
            )
