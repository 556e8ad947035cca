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
from ..config import HaloConfig, Scaling
from ..gemm import MULTIPLE
from ..hadamard import hadamard_transform
from ..linear import HaloLinear
from ..operands import pad_matrix, pad_tokens, quantize_grad_for_dgrad, quantize_input, quantize_weight
from ..ops.reference import QMAX
from ..quantize import Equalizer, Quantized, equalizer_exponents
from .batches import Batches, Sample
from .operands import Draws, below, of_rows, operand_columns, scale_of_amax, take_rows
from .plan import Plan, folds
from .reduce import reduce_dgrad, reduce_fprop, reduce_gradients, reduce_inputs, reduce_wgrad


class LayerProbe:
    """One layer in one sampled step: made in forward, completed by :meth:`backward` and ``batches.flush()``.

    Args:
        name: of the layer, for ``batches``.
        layer: its parameters unsharded.
        x: [M, K], what the layer multiplies, M at least 1.
        plan: recipes to measure.
        draws: the sample.
        batches: reduces samples of equal shape, of whatever layers.
    """

    def __init__(
        self, name: str, layer: HaloLinear, x: Tensor, plan: Plan, draws: Draws, batches: Batches
    ) -> None:
        self._name, self._plan, self._draws, self._batches = name, plan, draws, batches
        weight = layer.whole_weight()
        self._features = weight.shape[1]
        self._tokens = draws.take("tokens", x.shape[0])
        self._outputs = draws.take("outputs", weight.shape[0])
        self._inputs = draws.take("inputs", self._features)
        self._dgrad: Sample = {}
        self._wgrad: Sample = {}
        (x_rows, x_columns), (w_rows, w_columns) = ops.moments(x), ops.moments(weight)
        inputs = {"x_rows": x_rows, "x_columns": x_columns, "w_rows": w_rows, "w_columns": w_columns}
        if plan.configs:
            self._dgrad = {"w": weight[:, self._inputs], "w_amax": w_rows[0]}
            self._wgrad = {"x": x[:, self._inputs], "x_amax": x_rows[0]}
            inputs |= self._round(x, weight, _equalizer(layer, x, weight, plan))
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

    def _round(self, x: Tensor, weight: Tensor, equalizer: Equalizer | None) -> Sample:
        """X and W as the recipes round them that change them first: their sampled rows and columns.

        Returns:
            What :func:`reduce_inputs` takes besides moments.
        """
        plan = self._plan
        found: Sample = {}
        fprop = {"x": x[self._tokens], "w": weight[self._outputs]}
        if equalizer is not None:
            fprop |= {"d": equalizer.d, "inverse": equalizer.inverse}
        if plan.tensorwise:
            fprop |= {"x_amax": self._wgrad["x_amax"], "w_amax": self._dgrad["w_amax"]}
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.new_empty((len(plan.changed), *self._wgrad["x"].shape), dtype=wide)
        for i, out in zip(plan.changed, values, strict=True):
            config = plan.configs[i]
            factors = equalizer if config.equalize else None
            operand = quantize_input(x, None if factors is None else factors.inverse, config)
            self._columns(operand, None if factors is None else factors.d, config, out)
            self._wgrad[f"scale{i}"] = of_rows(operand.scale, len(x))
            if config == plan.own:
                found["x_scale"] = self._wgrad[f"scale{i}"]
                if factors is not None:
                    found |= {"x_factor": factors.inverse, "w_factor": factors.d}
            self._round_weight(i, weight, factors, operand, fprop, found)
        if plan.changed:
            values.mul_(torch.stack([self._wgrad[f"scale{i}"] for i in plan.changed])[..., None])
            # Of the error alone 8 bits of mantissa are plenty.
            errors = torch.empty_like(values, dtype=torch.bfloat16)
            torch.sub(values, self._wgrad["x"], out=errors)
            self._wgrad |= {f"error{i}": error for i, error in zip(plan.changed, errors, strict=True)}
        self._batches.add(self._name, reduce_fprop, plan, fprop)
        return found

    def _round_weight(
        self,
        i: int,
        weight: Tensor,
        factors: Equalizer | None,
        x_operand: Quantized,
        fprop: Sample,
        found: Sample,
    ) -> None:
        """The whole of W for a config that changes it, where sampled rows and columns do not say what they become."""
        config, own = self._plan.configs[i], self._plan.own
        rowwise = config.scaling is Scaling.ROWWISE
        if config != own and rowwise and config.requantize_w_dgrad:
            return
        operand = quantize_weight(weight, None if factors is None else factors.d, config)
        scale = of_rows(operand.scale, len(weight))
        if config == own:
            found["w_scale"] = scale  # the largest of all rows is asked for
        if not rowwise:
            # One scale for all of an operand: every row has a part in it.
            q = below(take_rows(x_operand, self._tokens), take_rows(operand, self._outputs))
            fprop |= {f"data{i}": q.data, f"scale{i}": q.scale}
        if not config.requantize_w_dgrad:
            columns = weight.new_empty(self._dgrad["w"].shape, dtype=operand.scale.dtype)
            self._columns(operand, None if factors is None else factors.inverse, config, columns)
            self._dgrad |= {f"values{i}": columns, f"scale{i}": scale}

    def _columns(self, q: Quantized, undo: Tensor | None, config: HaloConfig, out: Tensor) -> None:
        """The sampled columns of what the data of a rounded X or W stands for, into ``out`` [R, C].

        Args:
            undo: what takes the equalisation back, [K], or None.
        """
        taken = None if undo is None else undo[self._inputs]
        operand_columns(q, taken, self._draws, self._features, out, rotated=config.rotate_k)

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
            if folds(config) and (is_own or config.rotate_m_dgrad):
                fold = self._scale(self._dgrad, "w", i)
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


def _equalizer(layer: HaloLinear, x: Tensor, weight: Tensor, plan: Plan) -> Equalizer | None:
    """That of the layer, or that which an equalising what-if recipe would take from this batch."""
    if not plan.equalizes:
        return None
    if not layer.config.equalize:
        return Equalizer.of_exponents(equalizer_exponents(x, weight))
    return Equalizer.of_exponents(layer.equalizer_exponent) if layer.equalizer_taken else None
