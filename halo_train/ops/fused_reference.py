"""The operators that fuse a producer with the rounding of its result, in plain PyTorch; continues :mod:`halo_train.ops.reference`.

Producers are norms and gated activations. Their results are rounded once, from float32 (float64 for float64 input): they
are never stored in the dtype of the model, as the unfused sequence does. transformers' RMSNorm also rounds
x * rstd to that dtype before it multiplies by the weight; here nothing is rounded in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import quantize_rows, quantize_rows_transposed


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dtype: torch.dtype,
    block: int = 1,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm, or with ``center`` LayerNorm, of the rows of x, rotated and rounded: 8-bit rows of (y diag(col_scale)) H_block.

    y = (x - mean) rstd weight + bias with rstd = 1 / sqrt(mean((x - mean)^2) + eps), and mean 0 without ``center``.

    Args:
        x: [M, K], floating point.
        weight: [K], any real dtype, or None for ones. Gemma's 1 + w is the caller's, in float32.
        bias: [K] or None; only with ``center``.
        dtype, block, col_scale: as for :func:`reference.quantize_rows`.

    Returns:
        q [M, K] of ``dtype``, its scale [M], mean [M, 1] ([0] without ``center``) and rstd [M, 1], as aten's
        ``native_layer_norm_backward`` and ``_fused_rms_norm_backward`` want them; all but q in float32 (float64 for float64 x).
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = y.mean(1, keepdim=True) if center else y.new_empty(0)
    if center:
        y = y - mean
    rstd = torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
    y = y * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (*quantize_rows(y, dtype, block, col_scale), mean, rstd)


def rms_norm_backward(
    dys: list[Tensor], x: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of y = x rstd weight for the sum of several dy.

    With unit = x rstd and g = (sum of dy) weight: dx = rstd (g - unit mean(g unit)), dweight = sum over the rows of dy unit.

    Args:
        dys: one or more [M, K], any real dtypes; they are summed in float32 (float64 for float64 x).
        x: [M, K]; weight: [K] or None for ones; rstd: [M, 1] of :func:`norm_quantize`.

    Returns:
        dx [M, K] in the dtype of x; dweight [K] in that of the sums.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dy = functools.reduce(torch.add, (t.to(wide) for t in dys))
    unit = x.to(wide) * rstd
    g = dy if weight is None else dy * weight.to(wide)
    dx = rstd * (g - unit * (g * unit).mean(1, keepdim=True))
    return dx.to(x.dtype), (dy * unit).sum(0)


def gated_quantize(
    gate: Tensor,
    up: Tensor,
    activation: str,
    dtype: torch.dtype,
    block: int = 1,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SwiGLU, GeGLU: 8-bit rows of (h diag(col_scale)) H_block with h = act(gate) * up.

    Args:
        gate, up: [M, F], floating point; they may be halves of one tensor.
        activation: a key of :data:`ACTIVATIONS`.
        dtype, block, col_scale: as for :func:`reference.quantize_rows`.

    Returns:
        q [M, F] of ``dtype`` and scale [M].
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    value, _ = ACTIVATIONS[activation](gate.to(wide))
    return quantize_rows(value * up.to(wide), dtype, block, col_scale)


def gated_grad_quantize(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dtype: torch.dtype,
    row_scale: Tensor,
    gate_col_scale: Tensor | None = None,
    up_col_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Backward of h = act(gate) * up, its two results rounded as the layers behind them want their gradients.

    dgate = dh * up * act'(gate), dup = dh * act(gate), each as by :func:`reference.quantize_grad`.

    Args:
        dh, gate, up: [M, F].
        activation: a key of :data:`ACTIVATIONS`.
        row_scale: [M], of the transposed forms of both.
        gate_col_scale, up_col_scale: [F] or None for ones, of the rows of dgate and of dup.

    Returns:
        Pairs of 8-bit data and float32 scale: dgate diag(gate_col_scale) [M, F] and [M], dup diag(up_col_scale) likewise,
        (diag(row_scale) dgate)^T [F, M] and [F], (diag(row_scale) dup)^T likewise.
    """
    dgate, dup = gated_gradients(dh, gate, up, activation)
    return (
        *quantize_rows(dgate, dtype, 1, gate_col_scale),
        *quantize_rows(dup, dtype, 1, up_col_scale),
        *quantize_rows_transposed(dgate, dtype, row_scale),
        *quantize_rows_transposed(dup, dtype, row_scale),
    )


def gated_gradients(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = dh * up * act'(gate) and dup = dh * act(gate), unrounded: [M, F] in float32, of float64 in float64."""
    wide = torch.promote_types(dh.dtype, torch.float32)
    value, derivative = ACTIVATIONS[activation](gate.to(wide))
    return dh.to(wide) * up.to(wide) * derivative, dh.to(wide) * value


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    value = x * gate
    return value, gate + value * (1 - gate)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * gate, gate + x * torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    # 0.5 (1 + tanh u) = sigmoid(2 u), without the cancellation on the negative side.
    c = 2 * math.sqrt(2 / math.pi)
    gate = torch.sigmoid(c * (x + 0.044715 * x.pow(3)))
    value = x * gate
    return value, gate + value * (1 - gate) * c * (1 + 3 * 0.044715 * x.square())


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""Activations of gated layers: value and derivative."""
