"""Measuring one layer in one forward and backward: reductions of its tensors, and of its products by recipe.

Everything stays on the device. The operands are rounded again as the layer rounds them and multiplied in float64 on sampled
blocks::

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
from ..linear import HaloLinear
from ..quantize import Quantized, equalizer_exponents
from ..reference import QMAX
from .operands import (
    RotatedOperand,
    grad_columns,
    grad_rows,
    largest_value,
    rotation_columns,
    take_rows,
    unrotated,
    unrotated_columns,
    unrotated_slice,
    values_of,
)
from .sample import SampleSize
from .statistics import (
    Reduction,
    WholeTensor,
    exponent_reduction,
    outlier_reductions,
    product_reductions,
    rounding_reductions,
)

_Sampled = tuple[Tensor, Tensor, Tensor]
"""Rows before and after rounding in float64, and where they are saturated."""


class _Operand(NamedTuple):
    part: str
    sampled: _Sampled
    amax: Tensor
    """Of the whole operand, as is the RMS."""
    rms: Tensor


class _Forward(NamedTuple):
    """What backward needs of one recipe's forward."""

    config: HaloConfig
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
        results: ``{tensor or product: reductions}``; the names are in docs/metrics.md.
    """

    def __init__(
        self,
        layer: HaloLinear,
        x: Tensor,
        what_if: Mapping[str, HaloConfig],
        size: SampleSize,
        generator: torch.Generator,
    ) -> None:
        self.results: dict[str, list[Reduction]] = {}
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
        self._equalizer = self._take_equalizer(x, weight)
        self._inverse = None if self._equalizer is None else 1 / self._equalizer
        self._signs: Tensor | None = None
        self._forward: list[_Forward] = []
        self._measure_forward(x, weight)

    def _measure_forward(self, x: Tensor, weight: Tensor) -> None:
        whole, x_rows, w_rows = WholeTensor.of(x), x[self._tokens], weight[self._outputs]
        x_operand, w_sample = RotatedOperand(x, self._inverse), RotatedOperand(w_rows, self._equalizer)
        w_amax = torch.linalg.vector_norm(weight, math.inf)
        products = []
        # dict.fromkeys: a what-if recipe that the layer runs anyway is not computed twice.
        for config in dict.fromkeys(self._labels.values()):
            d = self._equalizer if config.equalize else None
            if config.rotate_k or d is not None:
                q = x_operand.rounded(config)
                x_q = take_rows(q, self._tokens)
                scale, columns = q.scale, self._columns(q, config, d)[: x.shape[0]]
                # Row scales of W do not depend on its other rows; one scale for all does.
                if config.scaling is Scaling.ROWWISE:
                    w_q = take_rows(w_sample.rounded(config), slice(len(w_rows)))
                else:
                    w_q = take_rows(RotatedOperand(weight, d).rounded(config), self._outputs)
            else:
                x_q = unrotated(x_rows, whole.amax(), config.format, config.scaling)
                w_q = unrotated(w_rows, w_amax, config.format, config.scaling)
                part = unrotated_slice(self._x_columns, whole.row_amax, config.format, config.scaling)
                scale, columns = part.scale, part.dequantize()
            products.append(values_of(x_q) @ values_of(w_q).t())
            self._forward.append(_Forward(config, scale, (columns - self._x_columns).bfloat16()))
            if config == self._own:
                operand = self._operand("x", x_operand, whole, x_q, scale, self._tokens, self._inverse)
                self._tensor("x", x_rows, whole, config.format, [operand])
        if self._own is None:
            self.results["x"] = whole.reductions()
        self._products("fprop", x_rows.double() @ w_rows.double().t(), products)

    def backward(self, e: Tensor) -> None:
        """e: [M, N] = dL/dY of the same call."""
        weight = self._layer.weight.detach()
        e_whole, w_whole = WholeTensor.of(e), WholeTensor.of(weight)
        e_amax, w_operand, w_columns = (
            e_whole.amax(),
            RotatedOperand(weight, self._equalizer),
            weight[:, self._inputs],
        )
        dgrad, wgrad = [], []
        x_columns = self._x_columns.double()
        for config, x_scale, x_error in self._forward:
            inverse = self._inverse if config.equalize else None
            if config.rotate_k or inverse is not None:
                w = w_operand.rounded(config)
                w_q, w_scale, columns = (
                    take_rows(w, self._outputs),
                    w.scale,
                    self._columns(w, config, inverse),
                )
            else:
                part = unrotated_slice(w_columns, w_whole.row_amax, config.format, config.scaling)
                w_q = unrotated(weight[self._outputs], w_whole.amax(), config.format, config.scaling)
                w_scale, columns = part.scale, part.dequantize()
            rows, row_values = grad_rows(e, e_amax, self._tokens, w_scale, config)
            cols, col_values = grad_columns(e, e_amax, self._outputs, x_scale, config)
            dgrad.append(row_values @ columns[: row_values.shape[1]].double())
            wgrad.append((col_values @ (x_columns + x_error.double())).t())
            if config == self._own:
                operand = self._operand("w", w_operand, w_whole, w_q, w_scale, self._outputs, self._equalizer)
                self._tensor("w", weight[self._outputs], w_whole, config.format, [operand])
                self._grad_stats(e, e_whole, w_scale, x_scale, rows, cols)
        if self._own is None:
            self.results["w"], self.results["e"] = w_whole.reductions(), e_whole.reductions()
        self._products("dgrad", e[self._tokens].double() @ w_columns.double(), dgrad)
        # Columns of dW stand where the other products have tokens.
        self._products("wgrad", x_columns.t() @ e[:, self._outputs].double(), wgrad)

    def _columns(self, q: Quantized, config: HaloConfig, factor: Tensor | None) -> Tensor:
        """The sampled input features of a rounded X or W, rotation and equalisation undone."""
        if not config.rotate_k:
            picked = Quantized(q.data.to(q.scale.dtype)[:, self._inputs], q.scale).dequantize()
        else:
            if self._signs is None:
                self._signs = rotation_columns(q.data.shape[1], self._inputs, q.scale.dtype)
            picked = unrotated_columns(q, self._signs)
        return picked if factor is None else picked * factor[self._inputs]

    def _operand(
        self,
        name: str,
        source: RotatedOperand,
        whole: WholeTensor,
        rounded: Quantized,
        scale: Tensor,
        rows: Tensor,
        factor: Tensor | None,
    ) -> _Operand:
        """X or W as the layer's recipe rounds it.

        Args:
            rounded: sampled rows; scale: of all rows.
            factor: what equalisation multiplies the columns by.
        """
        assert self._own is not None
        exact = source.exact(self._own)[rows]
        # A rotation fills the padded columns too.
        count = len(whole.col_norm)
        width = exact.shape[1] if self._own.rotate_k else count
        rms = whole.rms(col_scale=factor if self._own.equalize else None) * math.sqrt(count / width)
        return _Operand(f"{name}_operand", _sampled(exact, rounded, width), _amax(rounded, scale, whole), rms)

    def _grad_stats(
        self,
        e: Tensor,
        whole: WholeTensor,
        w_scale: Tensor,
        x_scale: Tensor,
        rows: Quantized,
        cols: Quantized,
    ) -> None:
        assert self._own is not None
        unrounded, (m, n) = self._own.without_rounding(), e.shape
        exact_rows, _ = grad_rows(e, whole.amax(), self._tokens, w_scale, unrounded)
        exact_cols, _ = grad_columns(e, whole.amax(), self._outputs, x_scale, unrounded)
        t: Tensor | None = None
        s: Tensor | None = None
        amax_rows, amax_cols = largest_value(rows).max(), whole.amax().double()
        if self._own.scaling is Scaling.ROWWISE:
            t, s = w_scale[:n], x_scale[:m]
            amax_cols = (whole.row_amax * s).max().double()
            if not self._own.rotate_m_dgrad:
                amax_rows = (torch.linalg.vector_norm(e, math.inf, dim=0) * t).max().double()
        dgrad = _sampled(exact_rows.dequantize(), rows, n)
        wgrad = _sampled(exact_cols.dequantize(), cols, m)
        operands = [
            _Operand("e_dgrad_operand", dgrad, amax_rows, whole.rms(col_scale=t)),
            _Operand("e_wgrad_operand", wgrad, amax_cols, whole.rms(row_scale=s)),
        ]
        self._tensor("e", e[self._tokens], whole, self._own.grad_format, operands)

    def _tensor(
        self, part: str, rows: Tensor, whole: WholeTensor, fmt: Format, operands: list[_Operand]
    ) -> None:
        """Statistics of a tensor rounded as it is, and of the operands that the recipe makes of it."""
        assert self._own is not None
        plain = unrotated(rows, whole.amax(), fmt, self._own.scaling)
        raw = _sampled(rows, plain, rows.shape[1])
        rounding = _rounding([raw, *(operand.sampled for operand in operands)])
        self.results[part] = [*whole.reductions(), rounding[0], exponent_reduction(raw[0])]
        for operand, stats in zip(operands, rounding[1:], strict=True):
            scale, before = Reduction("scale", (operand.amax, operand.rms)), operand.sampled[0]
            self.results[operand.part] = [
                scale,
                stats,
                *outlier_reductions(before),
                exponent_reduction(before),
            ]

    def _products(self, product: str, exact: Tensor, approximate: list[Tensor]) -> None:
        if not approximate:
            return
        reductions = product_reductions(exact, torch.stack(approximate))
        configs = [forward.config for forward in self._forward]
        for label, config in self._labels.items():
            self.results[product + label] = [reductions[configs.index(config)]]

    def _take_equalizer(self, x: Tensor, weight: Tensor) -> Tensor | None:
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


def _sampled(exact: Tensor, rounded: Quantized, width: int) -> _Sampled:
    """Without the columns that padding added."""
    data = rounded.data[:, :width].double()
    after = data * (rounded.scale[:, None] if rounded.scale.dim() else rounded.scale)
    return exact[:, :width].double(), after, data.abs() >= QMAX.get(rounded.data.dtype, 1.0)


def _amax(rounded: Quantized, scale: Tensor, whole: WholeTensor) -> Tensor:
    """Of the whole operand, from its scales; a row of zeros has scale 1."""
    largest = largest_value(Quantized(rounded.data, scale))
    if scale.dim():
        largest = largest[: len(whole.row_norm)]
    return torch.where(whole.row_norm == 0, 0.0, largest).max()


def _rounding(samples: list[_Sampled]) -> list[Reduction]:
    """Samples of one shape are reduced in one batch."""
    found: list[Reduction] = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample[0].shape):
        before, after, at_limit = (torch.stack(part) for part in zip(*group, strict=True))
        found += rounding_reductions(before, after, at_limit)
    return found
