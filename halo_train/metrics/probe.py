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
from ..quantize import Equalizer, Quantized, equalizer_exponents, quantize_transposed
from ..reference import QMAX
from .batches import Batches
from .operands import (
    Draws,
    SampledRows,
    Unrotated,
    below,
    grad_columns,
    grad_rows,
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
        running = layer.running_config
        self._own = None if running.format is Format.HIGH_PRECISION else running
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
        self._equalizer = self._take_equalizer(x, weight)
        x_whole, self._w_whole = WholeTensor.of(x), WholeTensor.of(weight)
        self._w_unrotated = Unrotated(self._w_whole, weight.dtype)
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
        rows = SampledRows(x[self._tokens], weight[self._outputs], self._equalizer)
        unrotated = Unrotated(x_whole, x.dtype)
        # Of X and below them of W: one kernel does for both.
        exact_rows = rows.exact(None)
        blocks = self._blocks(exact_rows)
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = x.new_empty((len(self._configs), *self._x_columns.shape), dtype=wide)
        divided = None if self._equalizer is None else self._equalizer.inverse
        undo = None if self._equalizer is None else self._equalizer.d[self._inputs]
        for i, config in enumerate(self._configs):
            whole = self._columns(x, unrotated, self._x_columns, config, divided, undo, columns[i])
            scale = _of_rows(whole.scale, len(x))
            columns[i].mul_(scale[:, None])
            self._x_scales.append(scale)
            rounded = self._round_rows(rows, config, unrotated, weight, whole)
            values_into(blocks[i + 1], rounded)
            if config == self._own:
                self._operand_scale("x_operand", x_whole, whole, divided)
                exact = rows.exact(config)
                width = exact.shape[1] if config.rotate_k else x.shape[1]
                for name, part in rows.parts().items():
                    found = self._found(f"{name}_operand")
                    self._batches.add_operand(found, exact[part], take_rows(rounded, part), width)
        self._x_errors = torch.empty_like(columns, dtype=torch.bfloat16)
        torch.sub(columns, self._x_columns, out=self._x_errors)
        parts = rows.parts()
        self._products("fprop", blocks[:, parts["x"]] @ blocks[:, parts["w"]].mT)
        if self._own is not None:
            plain = dataclasses.replace(self._own, rotate_k=False, equalize=False)
            rounded = self._round_rows(rows, plain, unrotated, weight)
            for name, part in parts.items():
                taken = take_rows(rounded, part)
                self._batches.add_tensor(self._found(name), exact_rows[part], taken, x.shape[1])

    def backward(self, e: Tensor) -> None:
        """e: [M, N] = dL/dY of the same call."""
        e_whole = WholeTensor.of(e)
        self._found("e").extend(e_whole.reductions())
        if self._x_errors is None:
            return
        weight, unrotated = self._layer.whole_weight(), Unrotated(e_whole, e.dtype)
        e_rows, e_columns, w_columns = e[self._tokens], e[:, self._outputs], weight[:, self._inputs]
        e_row_blocks, e_column_blocks = self._blocks(e_rows), self._blocks(e_columns.t())
        w_blocks, x_blocks = self._blocks(w_columns), self._blocks(self._x_columns)
        torch.add(x_blocks[0], self._x_errors, out=x_blocks[1:])
        for i, (config, x_scale) in enumerate(zip(self._configs, self._x_scales, strict=True), start=1):
            fold = self._dgrad_weight(weight, w_columns, config, w_blocks[i])
            rows = grad_rows(e, e_rows, unrotated, self._tokens, fold, config, e_row_blocks[i])
            columns = grad_columns(e_columns, unrotated, x_scale, config, e_column_blocks[i])
            # Row scales of X are in E already: what it meets is the data alone.
            if config.scaling is Scaling.ROWWISE:
                x_blocks[i].div_(x_scale[:, None])
            if config == self._own:
                self._dgrad_operand(e, e_rows, e_whole, unrotated, fold, rows)
                self._wgrad_operand(e_columns, e_whole, x_scale, columns)
                plain = unrotated.rows(e_rows, config.grad_format, config.scaling)
                self._batches.add_tensor(self._found("e"), e_rows, plain, e.shape[1])
        self._products("dgrad", e_row_blocks @ w_blocks)
        # Columns of dW stand where the other products have tokens.
        self._products("wgrad", (e_column_blocks @ x_blocks).mT)

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
        weight: Tensor,
        x_operand: Quantized | None = None,
    ) -> Quantized:
        """The sampled rows of X and W as a recipe rounds them; x_operand is the whole of X, where it changes X first."""
        if config.scaling is Scaling.ROWWISE:
            return rows.rounded(config)
        if x_operand is None or not _changes(config):
            scaling = config.scaling
            return rows.rounded_as_parts(
                config.format, x_unrotated.amax(scaling), self._w_unrotated.amax(scaling)
            )
        # One scale for all of the operand: every row of W has a part in it.
        multiplied = None if self._equalizer is None or not config.equalize else self._equalizer.d
        w_operand = round_operand(weight, multiplied, config)
        return below(take_rows(x_operand, self._tokens), take_rows(w_operand, self._outputs))

    def _columns(
        self,
        a: Tensor,
        unrotated: Unrotated,
        columns: Tensor,
        config: HaloConfig,
        factor: Tensor | None,
        undo: Tensor | None,
        out: Tensor,
    ) -> Quantized:
        """X or W [R, K] as a recipe rounds it.

        Args:
            columns: [R, C], those sampled.
            factor, undo: what equalisation multiplies the columns of a by, [K], and what takes that back in those sampled, [C].
            out: [R, C], receives what its data stands for in the sampled columns, rotation and equalisation undone.

        Returns:
            The rounded operand, or its sampled columns only where the recipe rounds them as they are.
        """
        if not _changes(config):
            part = unrotated.columns(columns, config.format, config.scaling)
            out.copy_(part.data)
            return part
        if not config.equalize:
            factor = undo = None
        operand = round_operand(a, factor, config)
        operand_columns(operand, undo, self._draws, a.shape[1], out, rotated=config.rotate_k)
        return operand

    def _operand_scale(
        self, name: str, whole: WholeTensor, rounded: Quantized, factor: Tensor | None
    ) -> None:
        """amax and RMS of X or W as the layer's recipe rounds it."""
        assert self._own is not None
        factor, columns = factor if self._own.equalize else None, len(whole.col_square)
        # A rotation fills the padded columns too.
        width = columns + (-columns % MULTIPLE if self._own.rotate_k else 0)
        self._batches.add_operand_scale(self._found(name), whole, rounded, factor, width)

    def _dgrad_weight(
        self, weight: Tensor, columns: Tensor, config: HaloConfig, out: Tensor
    ) -> Tensor | None:
        """What E meets in dgrad, and what is folded into E before: the row scales [N], or None.

        Args:
            columns: [N, C] of W, those sampled. out: [N, C] float64, receives the values.
        """
        if config == self._own or not config.requantize_w_dgrad:
            multiplied = None if self._equalizer is None else self._equalizer.d
            undo = None if self._equalizer is None else self._equalizer.inverse[self._inputs]
            whole = self._columns(weight, self._w_unrotated, columns, config, multiplied, undo, out)
            if config == self._own:
                self._operand_scale("w_operand", self._w_whole, whole, multiplied)
        if config.requantize_w_dgrad:
            values_into(out.mT, quantize_transposed(columns, config.format))
            return None
        w_scale = _of_rows(whole.scale, len(weight))
        if config.scaling is Scaling.ROWWISE:
            return w_scale
        out.mul_(w_scale[:, None])
        return None

    def _dgrad_operand(
        self,
        e: Tensor,
        e_rows: Tensor,
        whole: WholeTensor,
        unrotated: Unrotated,
        fold: Tensor | None,
        rounded: Quantized,
    ) -> None:
        """Rows of E diag(fold), rotated along M for HALO-2."""
        assert self._own is not None
        found = self._found("e_dgrad_operand")
        if self._own.rotate_m_dgrad:
            unrounded, out = self._own.without_rounding(), torch.empty_like(e_rows, dtype=torch.float64)
            exact = grad_rows(e, e_rows, unrotated, self._tokens, fold, unrounded, out).dequantize()
            squares = whole.col_square if fold is None else whole.col_square * fold.double().square()
            found.append(whole.scale(rounded.scale.max() * QMAX.get(rounded.data.dtype, 1.0), squares))
        elif fold is not None:
            exact = e_rows * fold
            amax = torch.linalg.vector_norm(e, math.inf, dim=0)
            self._batches.add_folded_scale(found, amax, whole.col_square, fold, e.numel())
        else:
            exact = e_rows
            found.append(whole.scale(whole.amax, whole.col_square))
        self._batches.add_operand(found, exact, rounded, e.shape[1])

    def _wgrad_operand(
        self, e_columns: Tensor, whole: WholeTensor, x_scale: Tensor, rounded: Quantized
    ) -> None:
        """Rows of (diag(s) E)^T."""
        assert self._own is not None
        found, exact = self._found("e_wgrad_operand"), e_columns.t()
        if self._own.scaling is Scaling.ROWWISE:
            exact = exact * x_scale
            count = len(whole.row_square) * len(whole.col_square)
            self._batches.add_folded_scale(found, whole.row_amax, whole.row_square, x_scale, count)
        else:
            found.append(whole.scale(whole.amax, whole.row_square))
        self._batches.add_operand(found, exact, rounded, exact.shape[1])

    def _products(self, product: str, blocks: Tensor) -> None:
        """blocks: [1 + recipes, R, Q], the exact product first."""
        found: list[list[Reduction]] = [[] for _ in self._configs]
        for label, config in self._labels.items():
            self.results[product + label] = found[self._configs.index(config)]
        self._batches.add_product(found, blocks)

    def _found(self, part: str) -> list[Reduction]:
        return self.results.setdefault(part, [])

    def _take_equalizer(self, x: Tensor, weight: Tensor) -> Equalizer | None:
        """That of the layer, or that which an equalising what-if recipe would take from this batch."""
        if not any(config.equalize for config in self._configs):
            return None
        if not self._layer.config.equalize:
            return Equalizer.of_exponents(equalizer_exponents(x, weight))
        return Equalizer.of_exponents(self._layer.equalizer_exponent) if self._layer.equalizer_taken else None


def _changes(config: HaloConfig) -> bool:
    """Whether a recipe rounds something else than X and W as they are."""
    return config.rotate_k or config.equalize


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """[rows], without the scales of padded rows."""
    return scale[:rows] if scale.dim() else scale.expand(rows)
