"""Measuring one layer in one forward and backward: statistics of its tensors, errors of its products by recipe.

Everything stays on the device. The operands are rounded again by the functions that the layer itself uses
(quantize_operands, quantize_grad_for_dgrad, quantize_grad_for_wgrad) and multiplied in float64 on sampled blocks::

    fprop   Y[tokens, outputs]      from X[tokens] and W[outputs]
    dgrad   dX[tokens, inputs]      from E[tokens] and W[:, inputs]
    wgrad   dW[outputs, inputs]     from E[:, outputs] and X[:, inputs]

The contracted axis is never sampled. Between forward and backward a layer keeps only the sampled columns of its input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Format, HaloConfig, Scaling
from ..functional import quantize_operands, quantize_weight
from ..linear import HaloLinear
from ..quantize import Quantized, equalizer_exponents
from .operands import (
    columns,
    grad_columns,
    grad_rows,
    largest_value,
    saturated,
    take_rows,
    unrotated_rows,
)
from .sample import HISTOGRAM, SampleSize
from .statistics import WholeTensor, exponent_histogram, matrix_outliers, product_stats, rounding_stats


class _Operand(NamedTuple):
    part: str
    values: tuple[Tensor, Tensor, Tensor]
    """Sampled rows before and after rounding, float64, and where they are saturated."""
    amax: Tensor
    """Of the whole operand, as is the RMS."""
    rms: Tensor


class _Forward(NamedTuple):
    """What backward needs of one recipe's forward."""

    config: HaloConfig
    equalizer: Tensor | None
    x_scale: Tensor
    x_error: Tensor
    """[M, inputs] bfloat16: rounded minus exact. Of the error alone, 8 bits of mantissa are plenty."""


class LayerProbe:
    """One layer in one sampled step: made in forward, completed by :meth:`backward`.

    Args:
        layer: its parameters unsharded.
        x: [M, K], what the layer multiplies, M at least 1.
        what_if: recipes by label.
        size: of the sample.
        generator: on the device of x; draws the sample.

    Attributes:
        results: ``{(part, group): vector}`` with the groups of :data:`halo_train.metrics.sample.GROUPS`.
    """

    def __init__(
        self,
        layer: HaloLinear,
        x: Tensor,
        what_if: Mapping[str, HaloConfig],
        size: SampleSize,
        generator: torch.Generator,
    ) -> None:
        self.results: dict[tuple[str, str], Tensor] = {}
        self._layer = layer
        self._own = None if layer.config.format is Format.HIGH_PRECISION else layer.config
        labels = {"": self._own, **{f"@{label}": config for label, config in what_if.items()}}
        self._labels = {
            label: c for label, c in labels.items() if c is not None and c.format is not Format.HIGH_PRECISION
        }
        weight = layer.weight.detach()
        self._tokens = _draw(x.shape[0], size.tokens, generator)
        self._outputs = _draw(weight.shape[0], size.out_features, generator)
        self._inputs = _draw(weight.shape[1], size.in_features, generator)
        self._x_columns = x[:, self._inputs]
        self._forward: list[_Forward] = []
        self._measure_forward(x, weight)

    def _measure_forward(self, x: Tensor, weight: Tensor) -> None:
        whole, x_rows, w_rows = WholeTensor.of(x), x[self._tokens], weight[self._outputs]
        equalizer = self._equalizer(x, weight)
        products = []
        # dict.fromkeys: a what-if recipe that the layer runs anyway is not computed twice.
        for config in dict.fromkeys(self._labels.values()):
            d = equalizer if config.equalize else None
            # Row scales of W do not depend on its other rows; one scale for all does.
            rowwise = config.scaling is Scaling.ROWWISE
            op = quantize_operands(x, w_rows if rowwise else weight, d, config)
            x_q = take_rows(op.x, self._tokens)
            w_q = take_rows(op.w, slice(len(w_rows)) if rowwise else self._outputs)
            products.append(x_q.dequantize().double() @ w_q.dequantize().double().t())
            rounded = columns(op.x, self._inputs, config.rotate_k, d)[: x.shape[0]]
            self._forward.append(_Forward(config, d, op.x.scale, (rounded - self._x_columns).bfloat16()))
            if config == self._own:
                exact = quantize_operands(x_rows, w_rows, d, config.without_rounding()).x
                operand = _Operand(
                    "x_operand",
                    _values(exact, x_q, _width(x, op.x, config)),
                    _amax_from_scales(op.x, whole),
                    whole.rms(col_scale=None if d is None else 1 / d) * _share(x, op.x, config),
                )
                self._tensor("x", x_rows, whole, config.format, [operand])
        if self._own is None:
            self.results["x", "whole"] = whole.stats()
        self._products("fprop", x_rows.double() @ w_rows.double().t(), products)

    def backward(self, e: Tensor) -> None:
        """e: [M, N] = dL/dY of the same call."""
        weight = self._layer.weight.detach()
        e_whole, w_whole = WholeTensor.of(e), WholeTensor.of(weight)
        e_amax = e_whole.amax()
        dgrad, wgrad = [], []
        for forward in self._forward:
            config, d = forward.config, forward.equalizer
            w = quantize_weight(weight, d, config)
            rows, row_values = grad_rows(e, e_amax, self._tokens, w, config)
            cols, col_values = grad_columns(e, e_amax, self._outputs, forward.x_scale, config)
            w_columns = columns(w, self._inputs, config.rotate_k, None if d is None else 1 / d)
            dgrad.append(row_values @ w_columns.double())
            wgrad.append((col_values @ (self._x_columns.double() + forward.x_error.double())).t())
            if config == self._own:
                self._weight_stats(weight, w_whole, w, d)
                self._grad_stats(e, e_whole, w, forward.x_scale, rows, cols)
        if self._own is None:
            self.results["w", "whole"], self.results["e", "whole"] = w_whole.stats(), e_whole.stats()
        self._products("dgrad", e[self._tokens].double() @ weight[:, self._inputs].double(), dgrad)
        # Columns of dW stand where the other products have tokens.
        self._products("wgrad", (e[:, self._outputs].double().t() @ self._x_columns.double()).t(), wgrad)

    def _weight_stats(self, weight: Tensor, whole: WholeTensor, w: Quantized, d: Tensor | None) -> None:
        assert self._own is not None
        rows = weight[self._outputs]
        exact = quantize_weight(rows, d, self._own.without_rounding())
        operand = _Operand(
            "w_operand",
            _values(exact, take_rows(w, self._outputs), _width(weight, w, self._own)),
            _amax_from_scales(w, whole),
            whole.rms(col_scale=d) * _share(weight, w, self._own),
        )
        self._tensor("w", rows, whole, self._own.format, [operand])

    def _grad_stats(
        self, e: Tensor, whole: WholeTensor, w: Quantized, x_scale: Tensor, rows: Quantized, cols: Quantized
    ) -> None:
        assert self._own is not None
        unrounded, (m, n) = self._own.without_rounding(), e.shape
        exact_rows, _ = grad_rows(e, whole.amax(), self._tokens, w, unrounded)
        exact_cols, _ = grad_columns(e, whole.amax(), self._outputs, x_scale, unrounded)
        t: Tensor | None = None
        s: Tensor | None = None
        if self._own.scaling is Scaling.ROWWISE:
            t, s = w.scale[:n], x_scale[:m]
            col_amax = torch.linalg.vector_norm(e, math.inf, dim=0)
            amax_rows = largest_value(rows).max() if self._own.rotate_m_dgrad else (col_amax * t).max()
            amax_cols = (whole.row_amax * s).max()
        else:
            amax_rows, amax_cols = largest_value(rows), whole.amax()
        operands = [
            _Operand("e_dgrad_operand", _values(exact_rows, rows, n), amax_rows, whole.rms(col_scale=t)),
            _Operand("e_wgrad_operand", _values(exact_cols, cols, m), amax_cols, whole.rms(row_scale=s)),
        ]
        self._tensor("e", e[self._tokens], whole, self._own.grad_format, operands)

    def _tensor(
        self, part: str, rows: Tensor, whole: WholeTensor, fmt: Format, operands: list[_Operand]
    ) -> None:
        """Statistics of a tensor rounded as it is, and of the operands that the recipe makes of it."""
        assert self._own is not None
        plain = unrotated_rows(rows, whole.amax(), fmt, self._own.scaling)
        raw = (rows.double(), plain.dequantize().double(), saturated(plain))
        rounding = _rounding([raw, *(operand.values for operand in operands)])
        self.results[part, "tensor"] = torch.cat([whole.stats(), rounding[0]])
        self.results[part, HISTOGRAM] = exponent_histogram(raw[0])
        for operand, stats in zip(operands, rounding[1:], strict=True):
            amax = operand.amax.double()
            scalars = torch.stack([amax, operand.rms, amax / operand.rms])
            before = operand.values[0]
            self.results[operand.part, "operand"] = torch.cat([scalars, matrix_outliers(before), stats])
            self.results[operand.part, HISTOGRAM] = exponent_histogram(before)

    def _products(self, product: str, exact: Tensor, approximate: list[Tensor]) -> None:
        if not approximate:
            return
        stats = product_stats(exact, torch.stack(approximate))
        configs = [forward.config for forward in self._forward]
        for label, config in self._labels.items():
            self.results[product + label, "product"] = stats[configs.index(config)]

    def _equalizer(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The layer's own d, or that which an equalising what-if recipe would take from this batch."""
        if not any(config.equalize for config in self._labels.values()):
            return None
        if self._layer.config.equalize:
            return self._layer.equalizer()
        return torch.exp2(equalizer_exponents(x, weight).float())


def _draw(n: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` different indices below n, all of them where n is not larger."""
    if size >= n:
        return torch.arange(n, device=generator.device)
    return torch.rand(n, generator=generator, device=generator.device).argsort()[:size]


def _values(exact: Quantized, rounded: Quantized, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values before and after rounding in float64, and where they are saturated, without the padded columns."""
    rows = rounded.data.shape[0]
    before, after = exact.dequantize()[:rows, :width], rounded.dequantize()[:, :width]
    return before.double(), after.double(), saturated(rounded)[:, :width]


def _width(x: Tensor, q: Quantized, config: HaloConfig) -> int:
    """Columns of an operand: a rotation fills those that were padded."""
    return q.data.shape[1] if config.rotate_k else x.shape[1]


def _share(x: Tensor, q: Quantized, config: HaloConfig) -> float:
    """Factor on the RMS of x for the columns that the padding added."""
    return math.sqrt(x.shape[1] / _width(x, q, config))


def _amax_from_scales(q: Quantized, whole: WholeTensor) -> Tensor:
    rows = whole.row_squares
    largest = largest_value(q)[: len(rows)] if q.scale.dim() else largest_value(q)
    # A row of zeros has scale 1.
    return torch.where(rows == 0, 0.0, largest).max()


def _rounding(samples: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """:func:`rounding_stats` of each; samples of one shape go in one batch, which saves most kernel launches."""
    found: list[Tensor] = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample[0].shape):
        before, after, at_limit = (torch.stack(part) for part in zip(*group, strict=True))
        found += rounding_stats(before, after, at_limit).unbind()
    return found
