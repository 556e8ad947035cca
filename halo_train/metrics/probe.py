"""Sampling one layer in one forward and backward: what its statistics need, taken while the tensors are there.

Everything stays on the device. Sampled blocks of the products wait with those of other layers
(:mod:`halo_train.metrics.reduce`)::

    fprop   Y[tokens, outputs]      from X[tokens] and W[outputs]
    dgrad   dX[tokens, inputs]      from E[tokens] and W[:, inputs]
    wgrad   dW[outputs, inputs]     from E[:, outputs] and X[:, inputs]

The contracted axis is never sampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..config import Scaling
from ..gemm import MULTIPLE
from ..hadamard import hadamard_transform
from ..linear import HaloLinear
from ..operands import (
    levels_of,
    pad_matrix,
    pad_tokens,
    quantize_grad_for_dgrad,
    quantize_input,
    quantize_input_columns,
    quantize_weight,
    quantize_weight_columns,
)
from ..ops.reference import QMAX
from ..quantize import Equalizer, Quantized, equalizer_exponents
from .batches import Batches, Sample
from .operands import Block, Draws, below, gather_rows, of_rows, operand_columns, scale_of_amax, take_rows
from .plan import Plan, folds
from .reduce import reduce_dgrad, reduce_fprop, reduce_gradients, reduce_inputs, reduce_wgrad


class InputProbe:
    """X as the recipes of a plan round it, for every layer that reads it with the same equalisation.

    Args:
        x: [M, K], what the layers multiply, M at least 1.
        equalizer: of the recipes that equalise.

    Attributes:
        rows, columns: moments of x.
        wgrad: what :func:`reduce_wgrad` takes of it.
        sampled: where a config rounds it changed and with one scale for all, the rows that are sampled, by config.
    """

    def __init__(self, x: Tensor, equalizer: Equalizer | None, plan: Plan, draws: Draws) -> None:
        self.equalizer = equalizer
        features = x.shape[1]
        self.rows, self.columns = ops.moments(x)
        self.wgrad: Sample = {}
        self.sampled: dict[int, Quantized] = {}
        if not plan.configs:
            return
        inputs = draws.take("inputs", features)
        self.wgrad = {"x": x[:, inputs], "x_amax": self.rows[0]}
        wide = torch.promote_types(x.dtype, torch.float32)
        by_rows = [i for i in plan.changed if not plan.forms[i].by_columns]
        values = x.new_empty((len(by_rows), *self.wgrad["x"].shape), dtype=wide)
        values_of_rows = dict(zip(by_rows, values, strict=True))
        for i in plan.changed:
            config = plan.configs[i]
            factors = equalizer if config.equalize else None
            operand = quantize_input(x, None if factors is None else factors.inverse, config)
            self.wgrad[f"scale{i}"] = of_rows(operand.scale, len(x))
            if i in values_of_rows:
                undo, out = None if factors is None else factors.d, values_of_rows[i]
                operand_columns(operand, undo, draws, features, out, rotated=config.rotate_k)
            else:
                columns = take_rows(quantize_input_columns(x, operand.scale, config), inputs)
                self.wgrad |= {f"data{i}": columns.data, f"tiles{i}": columns.scale}
            if config.scaling is Scaling.TENSORWISE:
                self.sampled[i] = take_rows(operand, draws.take("tokens", len(x)))
        if by_rows:
            values.mul_(torch.stack([self.wgrad[f"scale{i}"] for i in by_rows])[..., None])
            # Of the error alone 8 bits of mantissa are plenty.
            errors = torch.empty_like(values, dtype=torch.bfloat16)
            torch.sub(values, self.wgrad["x"], out=errors)
            self.wgrad |= {f"error{i}": error for i, error in zip(by_rows, errors, strict=True)}


class LayerProbe:
    """One layer in one sampled step: made in forward, completed by :meth:`backward` and ``batches.flush()``.

    Args:
        name: of the layer, for ``batches``.
        x: [M, K] and weight: [N, K], whole.
        read: of x, with the same plan and sample.
        plan: recipes to measure.
        draws, block: the sample, and what it is of this layer.
        batches: reduces samples of equal shape, of whatever layers.
    """

    def __init__(
        self,
        name: str,
        x: Tensor,
        weight: Tensor,
        read: InputProbe,
        plan: Plan,
        draws: Draws,
        block: Block,
        batches: Batches,
    ) -> None:
        self._name, self._plan, self._draws, self._batches = name, plan, draws, batches
        self._tokens, self._outputs = block.tokens, block.outputs
        self._dgrad: Sample = {}
        self._wgrad = dict(read.wgrad)
        rows, columns = ops.moments(weight)
        inputs = {"x_rows": read.rows, "x_columns": read.columns, "w_rows": rows, "w_columns": columns}
        if plan.configs:
            self._dgrad = {"w": weight[:, block.inputs], "w_amax": rows[0]}
            inputs |= self._round(x, weight, read)
            for i, config in enumerate(plan.configs):
                if config.requantize_w_dgrad and plan.forms[i].in_blocks:
                    whole = quantize_weight_columns(weight, None, config, in_tiles=True)
                    part = take_rows(whole, block.inputs)
                    self._dgrad |= {f"data{i}": part.data, f"tiles{i}": part.scale}
        batches.add(name, reduce_inputs, plan, inputs)

    def backward(self, e: Tensor) -> None:
        """e: [M, N] = dL/dY of the same call."""
        rows, columns = ops.moments(e)
        gradients = {"e_rows": rows, "e_columns": columns}
        if self._plan.configs:
            self._dgrad["e"] = e[self._tokens]
            self._wgrad["e"] = e.t().index_select(0, self._outputs)  # contiguous, as it is rounded
            if self._plan.tensorwise:
                self._dgrad["e_amax"] = self._wgrad["e_amax"] = rows[0]
            gradients |= self._round_gradient(e)
            self._batches.add(self._name, reduce_dgrad, self._plan, self._dgrad)
            self._batches.add(self._name, reduce_wgrad, self._plan, self._wgrad)
        self._batches.add(self._name, reduce_gradients, self._plan, gradients)

    def _round(self, x: Tensor, weight: Tensor, read: InputProbe) -> Sample:
        """The sampled rows of X and W, and W as the recipes round it that change it first.

        Returns:
            What :func:`reduce_inputs` takes besides moments.
        """
        plan, equalizer = self._plan, read.equalizer
        count = len(self._tokens)
        rows = x.new_empty(
            (count + len(self._outputs), x.shape[1]), dtype=torch.promote_types(x.dtype, weight.dtype)
        )
        gather_rows(x, self._tokens, rows[:count])
        gather_rows(weight, self._outputs, rows[count:])
        found: Sample = {}
        fprop = {"rows": rows, "tokens": self._tokens}
        if equalizer is not None:
            fprop |= {"d": equalizer.d, "inverse": equalizer.inverse}
        if plan.tensorwise:
            fprop |= {"x_amax": self._wgrad["x_amax"], "w_amax": self._dgrad["w_amax"]}
        for i in plan.changed:
            config = plan.configs[i]
            factors = equalizer if config.equalize else None
            if config == plan.own:
                found["x_scale"] = self._wgrad[f"scale{i}"]
                if factors is not None:
                    found |= {"x_factor": factors.inverse, "w_factor": factors.d}
            self._round_weight(i, weight, factors, read, fprop, found)
        self._batches.add(self._name, reduce_fprop, plan, fprop)
        return found

    def _round_weight(
        self,
        i: int,
        weight: Tensor,
        factors: Equalizer | None,
        read: InputProbe,
        fprop: Sample,
        found: Sample,
    ) -> None:
        """The whole of W for a config that changes it, where sampled rows and columns do not say what they become."""
        config, own = self._plan.configs[i], self._plan.own
        rowwise = config.scaling is Scaling.ROWWISE
        if config != own and rowwise and config.requantize_w_dgrad and not config.levels_w_dgrad:
            return
        operand = quantize_weight(weight, None if factors is None else factors.d, config)
        scale = of_rows(operand.scale, len(weight))
        if config == own:
            found["w_scale"] = scale  # the largest of all rows is asked for
        if not rowwise:
            # One scale for all of an operand: every row has a part in it.
            q = below(read.sampled[i], take_rows(operand, self._outputs))
            fprop |= {f"data{i}": q.data, f"scale{i}": q.scale}
        if not config.requantize_w_dgrad:
            columns = weight.new_empty(self._dgrad["w"].shape, dtype=operand.scale.dtype)
            undo = None if factors is None else factors.inverse
            operand_columns(operand, undo, self._draws, weight.shape[1], columns, rotated=config.rotate_k)
            self._dgrad |= {f"values{i}": columns, f"scale{i}": scale}
        elif config.levels_w_dgrad:
            self._dgrad[f"scale{i}"] = scale

    def _round_gradient(self, e: Tensor) -> Sample:
        """E as it is rounded for dgrad where that is no matter of single rows.

        Returns:
            What :func:`reduce_gradients` takes besides moments.
        """
        found: Sample = {}
        for i, config in enumerate(self._plan.configs):
            is_own = config == self._plan.own
            if is_own and config.scaling is Scaling.ROWWISE:
                found["x_scale"] = self._scale(self._wgrad, "x", i)
            fold = None
            if (folds(config) or config.levels_w_dgrad) and (is_own or config.rotate_m_dgrad):
                scale = self._scale(self._dgrad, "w", i)
                fold = scale if folds(config) else levels_of(scale, config)
            if is_own and fold is not None:
                found["fold"] = fold
                found["dgrad_amax"] = (torch.linalg.vector_norm(e, math.inf, dim=0) * fold).amax()
            if not config.rotate_m_dgrad:
                continue
            # Every token is mixed into every row.
            padded = pad_tokens(pad_matrix(e, MULTIPLE, 1))
            rotated = quantize_grad_for_dgrad(padded, fold, config)
            self._dgrad[f"e_values{i}"] = hadamard_transform(rotated.dequantize(), axis=0)[self._tokens]
            if is_own:
                exact = quantize_grad_for_dgrad(padded, fold, config.without_rounding())
                rows = take_rows(rotated, self._tokens)
                self._dgrad |= {"e_data": rows.data, "e_scale": rows.scale}
                self._dgrad["e_exact"] = take_rows(exact, self._tokens).dequantize()
                found["dgrad_amax"] = rotated.scale.max() * QMAX.get(rotated.data.dtype, 1.0)
        return found

    def _scale(self, sample: Sample, name: str, i: int) -> Tensor:
        """Row scales of X or W as a config rounds it, from its sample of columns."""
        if f"scale{i}" in sample:
            return sample[f"scale{i}"]
        return scale_of_amax(sample[f"{name}_amax"], sample[name].dtype, self._plan.configs[i].format)


def equalizer_of(layer: HaloLinear, x: Tensor, weight: Tensor, plan: Plan) -> Equalizer | None:
    """That of the layer, or that which an equalising what-if recipe would take from this batch."""
    if not plan.equalizes:
        return None
    if not layer.config.equalize:
        return Equalizer.of_exponents(equalizer_exponents(x, weight))
    return Equalizer.of_exponents(layer.equalizer_exponent) if layer.equalizer_taken else None
