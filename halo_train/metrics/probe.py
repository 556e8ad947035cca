"""Measuring one layer in one forward and backward: reductions of its tensors, and of its products by recipe.

Everything stays on the device. The operands are rounded again as the layer rounds them and multiplied in float64 on sampled
blocks::

    fprop   Y[tokens, outputs]      from X[tokens] and W[outputs]
    dgrad   dX[tokens, inputs]      from E[tokens] and W[:, inputs]
    wgrad   dW[outputs, inputs]     from E[:, outputs] and X[:, inputs]

The contracted axis is never sampled. Between forward and backward a layer keeps only the sampled columns of its input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import Format, HaloConfig, Scaling
from ..gemm import MULTIPLE
from ..linear import HaloLinear
from ..quantize import Quantized, equalizer_exponents
from .batches import Batches
from .operands import (
    Draws,
    SampledRows,
    Unrotated,
    grad_columns,
    grad_rows,
    largest_value,
    operand_columns,
    round_operand,
    take_rows,
    values_into,
)
from .statistics import Reduction, WholeTensor


class LayerProbe:
    """One layer in one sampled step: made in forward, completed by :meth:`backward` and ``batches.flush()``.

    Args:
        layer: its parameters unsharded.
        x: [M, K], what the layer multiplies, M at least 1.
        what_if: recipes by label.
        draws: the sample.
        batches: reduces samples of equal shape, of whatever layers.

    Attributes:
        results: ``{tensor or product: reductions}``; the names are in docs/metrics.md.
    """

    def __init__(
        self, layer: HaloLinear, x: Tensor, what_if: Mapping[str, HaloConfig], draws: Draws, batches: Batches
    ) -> None:
        self._layer, self._draws, self._batches = layer, draws, batches
        self._own = None if layer.config.format is Format.HIGH_PRECISION else layer.config
        labels = {"": self._own, **{f"@{label}": config for label, config in what_if.items()}}
        self._labels = {
            label: c for label, c in labels.items() if c is not None and c.format is not Format.HIGH_PRECISION
        }
        # A what-if recipe that the layer runs anyway is not computed twice.
        self._configs = list(dict.fromkeys(self._labels.values()))
        weight = layer.whole_weight()
        self._tokens = draws.take("tokens", x.shape[0])
        self._outputs = draws.take("outputs", weight.shape[0])
        self._inputs = draws.take("inputs", weight.shape[1])
        self._d = self._take_equalizer(x, weight)
        self._inverse = None if self._d is None else 1 / self._d
        x_whole, self._w_whole = WholeTensor.of(x), WholeTensor.of(weight)
        self._w_unrotated = Unrotated(self._w_whole.row_amax, self._w_whole.amax)
        self.results: dict[str, list[Reduction]] = {}
        self._found("x").extend(x_whole.reductions())
        self._found("w").extend(self._w_whole.reductions())
        self._x_columns = x[:, self._inputs]
        self._x_errors: Tensor | None = None
        """[recipes, M, inputs] bfloat16, rounded minus exact: of the error alone, 8 bits of mantissa are plenty."""
        self._x_scales: list[Tensor] = []
        if self._configs:
            self._measure_forward(x, x_whole, weight)

    def _measure_forward(self, x: Tensor, x_whole: WholeTensor, weight: Tensor) -> None:
        rows = SampledRows(x[self._tokens], weight[self._outputs], self._d)
        unrotated = Unrotated(x_whole.row_amax, x_whole.amax)
        x_rows, w_rows = rows.exact(None)
        x_hat, w_hat, columns = self._blocks(x_rows), self._blocks(w_rows), []
        for i, config in enumerate(self._configs, start=1):
            whole, picked = self._columns(x, unrotated, self._x_columns, config, self._inverse, self._d)
            columns.append(picked)
            self._x_scales.append(_of_rows(whole.scale, len(x)))
            x_q, w_q = self._round_rows(rows, config, unrotated, whole)
            values_into(x_hat[i], x_q)
            values_into(w_hat[i], w_q)
            if config == self._own:
                self._operand_scale("x", x_whole, whole, self._inverse)
                x_exact, w_exact = rows.exact(config)
                # A rotation fills the padded columns too.
                width = x_exact.shape[1] if config.rotate_k else x.shape[1]
                for name, exact, rounded in (("x", x_exact, x_q), ("w", w_exact, w_q)):
                    self._batches.add_operand(self._found(f"{name}_operand"), exact, rounded, width)
        self._x_errors = (torch.stack(columns) - self._x_columns).bfloat16()
        self._products("fprop", x_hat @ w_hat.mT)
        if self._own is not None:
            plain = dataclasses.replace(self._own, rotate_k=False, equalize=False)
            x_q, w_q = self._round_rows(rows, plain, unrotated)
            for name, exact, rounded in (("x", x_rows, x_q), ("w", w_rows, w_q)):
                self._batches.add_tensor(self._found(name), exact, rounded, x.shape[1])

    def backward(self, e: Tensor) -> None:
        """e: [M, N] = dL/dY of the same call."""
        e_whole = WholeTensor.of(e)
        self._found("e").extend(e_whole.reductions())
        if self._x_errors is None:
            return
        weight, unrotated = self._layer.whole_weight(), Unrotated(e_whole.row_amax, e_whole.amax)
        e_rows, e_columns, w_columns = e[self._tokens], e[:, self._outputs], weight[:, self._inputs]
        e_row_hat, e_column_hat = self._blocks(e_rows), self._blocks(e_columns.t())
        w_hat, x_hat = self._blocks(w_columns), self._blocks(self._x_columns)
        torch.add(x_hat[0], self._x_errors, out=x_hat[1:])
        for i, (config, x_scale) in enumerate(zip(self._configs, self._x_scales, strict=True), start=1):
            whole, picked = self._columns(
                weight, self._w_unrotated, w_columns, config, self._d, self._inverse
            )
            w_hat[i] = picked
            w_scale = _of_rows(whole.scale, len(weight))
            rows = grad_rows(e, e_rows, unrotated, self._tokens, w_scale, config, e_row_hat[i])
            columns = grad_columns(e_columns, unrotated, x_scale, config, e_column_hat[i])
            if config == self._own:
                self._operand_scale("w", self._w_whole, whole, self._d)
                self._dgrad_operand(e, e_rows, e_whole, unrotated, w_scale, rows)
                self._wgrad_operand(e_columns, e_whole, x_scale, columns)
                plain = unrotated.rows(e_rows, config.grad_format, config.scaling)
                self._batches.add_tensor(self._found("e"), e_rows, plain, e.shape[1])
        self._products("dgrad", e_row_hat @ w_hat)
        # Columns of dW stand where the other products have tokens.
        self._products("wgrad", (e_column_hat @ x_hat).mT)

    def _blocks(self, exact: Tensor) -> Tensor:
        """[1 + recipes, R, Q] float64: an operand of a product, exact and then as each recipe rounds it."""
        blocks = exact.new_empty((1 + len(self._configs), *exact.shape), dtype=torch.float64)
        blocks[0] = exact
        return blocks

    def _round_rows(
        self,
        rows: SampledRows,
        config: HaloConfig,
        x_unrotated: Unrotated,
        x_operand: Quantized | None = None,
    ) -> tuple[Quantized, Quantized]:
        """The sampled rows of X and W as a recipe rounds them; x_operand is the whole of X, where it changes X first."""
        if config.scaling is Scaling.ROWWISE:
            return rows.rounded(config)
        if x_operand is None or not _changes(config):
            x_rows, w_rows = rows.exact(config)
            return (
                x_unrotated.rows(x_rows, config.format, config.scaling),
                self._w_unrotated.rows(w_rows, config.format, config.scaling),
            )
        # One scale for all of the operand: every row of W has a part in it.
        w_operand = round_operand(self._layer.whole_weight(), self._d if config.equalize else None, config)
        return take_rows(x_operand, self._tokens), take_rows(w_operand, self._outputs)

    def _columns(
        self,
        a: Tensor,
        unrotated: Unrotated,
        columns: Tensor,
        config: HaloConfig,
        factor: Tensor | None,
        undo: Tensor | None,
    ) -> tuple[Quantized, Tensor]:
        """X or W [R, K] as a recipe rounds it.

        Args:
            columns: [R, C], those sampled.
            factor, undo: what equalisation multiplies the columns of a by, and what takes that back.

        Returns:
            The rounded operand, or its sampled columns only where the recipe rounds them as they are; and the values [R, C]
            that stand in the sampled columns, rotation and equalisation undone.
        """
        if not _changes(config):
            part = unrotated.columns(columns, config.format, config.scaling)
            return part, part.dequantize()
        if not config.equalize:
            factor = undo = None
        operand = round_operand(a, factor, config)
        values = operand_columns(operand, undo, a.shape[1], self._draws, rotated=config.rotate_k)
        return operand, values[: len(a)]

    def _operand_scale(
        self, name: str, whole: WholeTensor, rounded: Quantized, factor: Tensor | None
    ) -> None:
        """amax and RMS of X or W as the layer's recipe rounds it, from its scales and the norms of its columns."""
        assert self._own is not None
        largest = largest_value(_of_rows(rounded.scale, len(whole.row_amax)), rounded.data.dtype)
        # A row of zeros has scale 1.
        amax = torch.where(whole.row_amax == 0, 0.0, largest).max()
        squares = whole.col_square
        if factor is not None and self._own.equalize:
            squares = squares * factor.square()
        # A rotation fills the padded columns too.
        width = len(squares) + (-len(squares) % MULTIPLE if self._own.rotate_k else 0)
        self._found(f"{name}_operand").append(whole.scale(amax, squares, width))

    def _dgrad_operand(
        self,
        e: Tensor,
        e_rows: Tensor,
        whole: WholeTensor,
        unrotated: Unrotated,
        w_scale: Tensor,
        rounded: Quantized,
    ) -> None:
        """Rows of E diag(t), rotated along M for HALO-2."""
        assert self._own is not None
        exact, squares, amax = e_rows, whole.col_square, whole.amax
        if w_scale.dim():
            squares = squares * w_scale.double().square()
        if self._own.rotate_m_dgrad:
            exact = torch.empty_like(e_rows, dtype=torch.float64)
            unrounded = self._own.without_rounding()
            rows = grad_rows(e, e_rows, unrotated, self._tokens, w_scale, unrounded, exact)
            exact = rows.dequantize()
            amax = largest_value(rounded.scale, rounded.data.dtype).max()
        elif w_scale.dim():
            exact = e_rows * w_scale
            amax = (torch.linalg.vector_norm(e, math.inf, dim=0) * w_scale).max()
        self._found("e_dgrad_operand").append(whole.scale(amax, squares))
        self._batches.add_operand(self._found("e_dgrad_operand"), exact, rounded, e.shape[1])

    def _wgrad_operand(
        self, e_columns: Tensor, whole: WholeTensor, x_scale: Tensor, rounded: Quantized
    ) -> None:
        """Rows of (diag(s) E)^T."""
        exact, squares, amax = e_columns.t(), whole.row_square, whole.amax
        if x_scale.dim():
            exact, amax = exact * x_scale, (whole.row_amax * x_scale).max()
            squares = squares * x_scale.double().square()
        self._found("e_wgrad_operand").append(whole.scale(amax, squares))
        self._batches.add_operand(self._found("e_wgrad_operand"), exact, rounded, exact.shape[1])

    def _products(self, product: str, blocks: Tensor) -> None:
        """blocks: [1 + recipes, R, Q], the exact product first."""
        found: list[list[Reduction]] = [[] for _ in self._configs]
        for label, config in self._labels.items():
            self.results[product + label] = found[self._configs.index(config)]
        self._batches.add_product(found, blocks)

    def _found(self, part: str) -> list[Reduction]:
        return self.results.setdefault(part, [])

    def _take_equalizer(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The layer's own d, or that which an equalising what-if recipe would take from this batch."""
        if not any(config.equalize for config in self._configs):
            return None
        if self._layer.config.equalize:
            return self._layer.equalizer()
        return torch.exp2(equalizer_exponents(x, weight).float())


def _changes(config: HaloConfig) -> bool:
    """Whether a recipe rounds something else than X and W as they are."""
    return config.rotate_k or config.equalize


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """Scales without those of padded rows; one scale for all as it is."""
    return scale[:rows] if scale.dim() else scale
