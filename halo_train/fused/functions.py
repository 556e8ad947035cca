"""The autograd Functions of :mod:`halo_train.fused`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..config import Recompute, storage_dtype
from ..gemm import matmul
from ..operands import (
    contract_rows,
    pad_vector,
    rotation_block,
    rounds_in_blocks,
)
from ..products import (
    ForDgrad,
    after,
    again,
    as_matrix,
    as_output,
    crop,
    dgrad,
    for_dgrad,
    fprop,
    once_differentiable,
    pad_rows_again,
    round_gradient,
    undo_fold,
    wgrad,
    without_autocast,
)
from ..quantize import Quantized, RoundedWeight
from .inputs import (
    Arguments,
    recomputes,
    round_columns,
    round_hidden,
    round_input,
    round_input_again,
    takes_columns,
)


class Layer(NamedTuple):
    """The operands of a linear layer."""

    weight: Tensor
    """[N, K]."""
    bias: Tensor | None = None
    """[N]."""
    rounded: RoundedWeight | None = None
    """What :func:`halo_train.functional.round_weight` made of the weight; None rounds it here."""


class ProjectionsFunction(torch.autograd.Function):
    """Y_i [..., N_i] from x [..., K], the norm's weight and bias, d and 1/d [K], and for each layer its weight, bias, and data and
    scales of the rows and of the columns of its RoundedWeight. All but x and the weights may be None.

    Saved, as far as a gradient needs it: the rounded input (1 byte an element) with its scales, and what dgrad takes of each
    weight, as in HaloLinearFunction; with a norm x, rstd and the mean of a LayerNorm, and no rounded input if the config says so or
    wgrad takes columns, which are made of x and rstd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arguments: Arguments,
        x: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        d: Tensor | None,
        inverse: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layers, tokens = _unflatten(flat), as_matrix(x)
        rounded, saved_norm = round_input(tokens, arguments, gain, shift, inverse)
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        for layer in layers:
            y, w = _fprop(rounded, layer, d, arguments)
            outputs.append(as_output(y, x.shape[:-1], layer.weight.shape[0]))
            saved.extend(w)
        needs_dy, needs_dw = any(ctx.needs_input_grad[1:4]), any(ctx.needs_input_grad[6::_PER_LAYER])
        recompute = recomputes(arguments)
        ctx.by_columns = (
            needs_dy and needs_dw and takes_columns(tokens, [layer.weight for layer in layers], arguments)
        )
        ctx.save_for_backward(
            *_if(needs_dy or (needs_dw and recompute), *saved_norm),
            *_if(needs_dw and not recompute and not ctx.by_columns, rounded.data),
            *(rounded.scale, d, inverse),
            *_if(needs_dy, *saved),
        )
        ctx.arguments, ctx.x_shape, ctx.forms = arguments, x.shape, [_Form.of(layer) for layer in layers]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs, arguments = ctx.saved_tensors, ctx.needs_input_grad, ctx.arguments
        data, scale, d, inverse = saved[5:9]
        config, needs_dy = arguments.config, any(needs[1:4])
        block = rotation_block(ctx.x_shape[-1], config)
        found: list[Tensor | None] = []
        with without_autocast(scale.device.type):
            x, some, dys = None, next((e for e in grads if e is not None), None), []
            if some is not None and any(needs[6::_PER_LAYER]):
                if ctx.by_columns:
                    x = round_columns(saved[:5], after(scale, some), arguments)
                else:
                    if data is None:
                        data = round_input_again(saved[:3], inverse, some, ctx.x_shape, arguments)
                    x = contract_rows(Quantized(data, scale))
            for i, (e, form) in enumerate(zip(grads, ctx.forms, strict=True)):
                w, dw, db = ForDgrad(*saved[9 + _SAVED * i : 9 + _SAVED * (i + 1)]), None, None
                needs_dw, needs_db = needs[6 + _PER_LAYER * i : 8 + _PER_LAYER * i]
                if e is not None:
                    bias_dtype = form.bias_dtype if needs_db else None
                    for_dx, for_dw, db = round_gradient(
                        as_matrix(e), w, scale, needs_dy, needs_dw, bias_dtype, config, ctx.by_columns
                    )
                    if for_dx is not None:
                        dys.append(dgrad(for_dx, w, arguments.out_dtype, config))
                    if for_dw is not None and x is not None:
                        dw = wgrad(for_dw, x, block, d, form.weight, config)
                found += [dw, db, *_NO_GRADIENTS]
            inputs = _input_backward(dys, block, inverse, ctx.x_shape, saved[:5], needs[1:4], arguments)
        return None, *inputs, None, None, *found


class GatedMLPFunction(torch.autograd.Function):
    """Y [..., N] from x [..., K], the norm's weight and bias, d and 1/d of gate and up [K], those of down [F], and the layers as
    in :class:`ProjectionsFunction`.

    Saved: as there for gate and up; what they computed [M', F'], in the dtype of the products; h rounded, with its scales, and what
    dgrad takes of down. Where the config says that h, or gate and up too, are made again, what that takes instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        arguments: Arguments,
        x: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        d: Tensor | None,
        inverse: Tensor | None,
        down_d: Tensor | None,
        down_inverse: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        config, layers, tokens = arguments.config, _unflatten(flat), as_matrix(x)
        rounded, saved_norm = round_input(tokens, arguments, gain, shift, inverse)
        # As the products leave them, padded: what is padding is zero, and so is act(0) * 0.
        gate, gate_w = _fprop(rounded, layers[0], d, arguments)
        up, up_w = _fprop(rounded, layers[1], d, arguments)
        hidden = round_hidden(gate, up, down_inverse, layers[2].weight.shape[1], arguments)
        y, down_w = _fprop(hidden, layers[2], down_d, arguments)
        needs_dy = any(ctx.needs_input_grad[1:4])
        needs_gate, needs_up, needs_down = ctx.needs_input_grad[8:21:_PER_LAYER]
        needs_dh, needs_x = needs_dy or needs_gate or needs_up, needs_gate or needs_up
        recompute, multiplies = recomputes(arguments), config.recompute is Recompute.MLP
        needs_halves = needs_dh or (needs_down and config.recomputes_inputs)
        reads_x = needs_x or (needs_halves and multiplies)
        ctx.by_columns = (
            needs_dy and needs_x and takes_columns(tokens, [layer.weight for layer in layers[:2]], arguments)
        )
        ctx.save_for_backward(
            *_if(needs_dy or (reads_x and recompute), *saved_norm),
            *_if(reads_x and not recompute and not ctx.by_columns, rounded.data),
            *(rounded.scale, d, inverse, down_d, down_inverse),
            *_if(needs_halves and not multiplies, gate, up),
            *_if(needs_down and not config.recomputes_inputs, hidden.data),
            hidden.scale,
            *_if(needs_dy, *gate_w, *up_w),
            *_if(needs_dh, *down_w),
            *_if(needs_halves and multiplies, *_for_fprop(layers[0], gate_w), *_for_fprop(layers[1], up_w)),
        )
        ctx.arguments, ctx.x_shape, ctx.forms = arguments, x.shape, [_Form.of(layer) for layer in layers]
        return as_output(y, x.shape[:-1], layers[2].weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs, arguments = ctx.saved_tensors, ctx.needs_input_grad, ctx.arguments
        config = arguments.config
        data, scale, d, inverse, down_d, down_inverse, gate, up, h_data, h_scale = saved[5:15]
        weights = [ForDgrad(*saved[i : i + _SAVED]) for i in range(15, len(saved), _SAVED)]
        (gate_w, up_w, down_w), saved_for_halves = weights[:3], weights[3:]
        gate_form, up_form, down_form = ctx.forms
        needs_dy, needs_bias = any(needs[1:4]), needs[21]
        needs_gate, needs_up, needs_down = needs[8:21:_PER_LAYER]
        needs_dh = needs_dy or needs_gate or needs_up
        block, down_block = (rotation_block(f.weight[0][1], config) for f in (gate_form, down_form))
        dw_gate = dw_up = dw_down = None
        dys: list[Tensor] = []
        with without_autocast(e.device.type):
            reads_x = needs_gate or needs_up
            halves_again = config.recompute is Recompute.MLP and (needs_dh or needs_down)
            if data is None and (halves_again or (reads_x and not ctx.by_columns)):
                data = round_input_again(saved[:3], inverse, e, ctx.x_shape, arguments)
            if halves_again:
                assert data is not None
                x = Quantized(data, after(scale, e))
                gate, up = (_fprop_again(x, w, d, arguments) for w in saved_for_halves)
            bias_dtype = down_form.bias_dtype if needs_bias else None
            for_dh, for_dw, db = round_gradient(
                as_matrix(e), down_w, h_scale, needs_dh, needs_down, bias_dtype, config
            )
            if for_dw is not None:
                if h_data is None:
                    width = down_form.weight[0][1]
                    h_data = round_hidden(gate, up, again(down_inverse, width, e), width, arguments).data
                h = Quantized(h_data, h_scale)
                dw_down = wgrad(for_dw, h, down_block, down_d, down_form.weight, config, rows=True)
                del h, h_data
            if for_dh is not None:
                dh = undo_fold(
                    dgrad(for_dh, down_w, arguments.out_dtype, config), down_block, down_inverse, config
                )
                folds = gate_w.fold(config, gate.shape[1]), up_w.fold(config, up.shape[1])
                dtype = storage_dtype(config.grad_format, dh.dtype)
                in_blocks = rounds_in_blocks(dh, config)
                rounding = ops.gated_grad_blocks if in_blocks else ops.gated_grad_quantize
                parts = rounding(dh, gate, up, arguments.activation, dtype, scale, *folds)
                dgate, dup, dgate_t, dup_t = (Quantized(*parts[i : i + 2]) for i in (0, 2, 4, 6))
                del dh, gate, up  # before x is transposed and dW made
                if needs_dy:
                    dys = [
                        dgrad(part, w, arguments.out_dtype, config)
                        for part, w in ((dgate, gate_w), (dup, up_w))
                    ]
                if reads_x:
                    x = (
                        round_columns(saved[:5], after(scale, e), arguments)
                        if ctx.by_columns
                        else contract_rows(Quantized(data, scale))
                    )
                    dw_gate = wgrad(dgate_t, x, block, d, gate_form.weight, config) if needs_gate else None
                    dw_up = wgrad(dup_t, x, block, d, up_form.weight, config) if needs_up else None
            inputs = _input_backward(dys, block, inverse, ctx.x_shape, saved[:5], needs[1:4], arguments)
        of_layers = (dw_gate, None, *_NO_GRADIENTS, dw_up, None, *_NO_GRADIENTS, dw_down, db, *_NO_GRADIENTS)
        return None, *inputs, None, None, None, None, *of_layers


class _Form(NamedTuple):
    """What backward needs to know of a layer."""

    weight: tuple[torch.Size, torch.dtype]
    bias_dtype: torch.dtype | None

    @staticmethod
    def of(layer: Layer) -> _Form:
        weight, bias = layer.weight, layer.bias
        return _Form((weight.shape, weight.dtype), None if bias is None else bias.dtype)


_SAVED = 4
"""Tensors of a :class:`ForDgrad`."""

_PER_LAYER = 6
"""Tensors that a Function takes for a layer, one by one, because autograd sees no tensors inside tuples."""

_NO_GRADIENTS = (None,) * 4
"""Of those that are no parameters."""


def flatten(layers: Sequence[Layer]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for weight, bias, rounded in layers:
        rows, columns = rounded or (None, None)
        found += [weight, bias, *(rows or (None, None)), *(columns or (None, None))]
    return found


def _unflatten(flat: tuple[Tensor | None, ...]) -> list[Layer]:
    found = []
    for i in range(0, len(flat), _PER_LAYER):
        weight, bias, data, scale, column_data, column_scale = flat[i : i + _PER_LAYER]
        assert weight is not None
        rounded = None
        if data is not None and scale is not None:
            columns = None
            if column_data is not None and column_scale is not None:
                columns = Quantized(column_data, column_scale)
            rounded = RoundedWeight(Quantized(data, scale), columns)
        found.append(Layer(weight, bias, rounded))
    return found


def _if(needed: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors if needed else (None,) * len(tensors)


def _fprop(x: Quantized, layer: Layer, d: Tensor | None, arguments: Arguments) -> tuple[Tensor, ForDgrad]:
    """Y [M', N'] padded, and what dgrad takes of the weight."""
    config, rounded = arguments.config, layer.rounded
    given = None if rounded is None else rounded.rows
    y, data, scale = fprop(x, layer.weight, d, given, arguments.out_dtype, config)
    if layer.bias is not None:
        y = y + pad_vector(layer.bias.to(y.dtype), y.shape[1])
    return y, for_dgrad(layer.weight, data, scale, None if rounded is None else rounded.columns, config)


def _for_fprop(layer: Layer, for_dgrad: ForDgrad) -> ForDgrad:
    """What to save of a weight for :func:`_fprop_again`; for_dgrad: what dgrad takes of it, which is the same where W is rounded here."""
    return for_dgrad if layer.rounded is None else ForDgrad(None, *layer.rounded.rows)


def _fprop_again(x: Quantized, w: ForDgrad, d: Tensor | None, arguments: Arguments) -> Tensor:
    """Y of :func:`_fprop` without its bias, the same bits; w: of :func:`_for_fprop`."""
    if w.weight is not None:
        return fprop(x, w.weight, d, None, arguments.out_dtype, arguments.config)[0]
    assert w.data is not None
    assert w.scale is not None
    rows = pad_rows_again(Quantized(w.data, w.scale), x.scale)
    return matmul(x, rows, arguments.out_dtype, arguments.config.fast_accum)


def _input_backward(
    dys: list[Tensor],
    block: int,
    inverse: Tensor | None,
    x_shape: torch.Size,
    saved: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    arguments: Arguments,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of the norm's weight and bias from the layers' dY [M', K']; saved: of :func:`round_input`."""
    if not dys:
        return None, None, None
    k, norm = x_shape[-1], arguments.norm
    # A norm's backward sums them itself; what is rotated back is their sum.
    most = ops.MAX_GRADIENTS if norm is not None and arguments.config.requantize_w_dgrad else 1
    while len(dys) > most:
        dys[-2].add_(dys.pop())
    dys[0] = undo_fold(dys[0], block, inverse, arguments.config)
    dys = [crop(dy, x_shape.numel() // k, k) for dy in dys]
    if norm is None:
        return dys[0].reshape(x_shape), None, None
    x, gain, shift, mean, rstd = saved
    assert x is not None
    assert mean is not None
    assert rstd is not None
    dx, dgain, dshift = norm._replace(weight=gain, bias=shift).backward(dys, x, mean, rstd, *needs)
    return None if dx is None else dx.view(x_shape), dgain, dshift
