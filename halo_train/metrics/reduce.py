"""From samples of L layers, stacked, to sums: the operands are rounded as the layers round them and multiplied in float64.

What an operand needs of its whole tensor is in the sample beside its rows: the largest magnitudes that decide scales, or the
rounded values where a rotation mixes in what was not sampled. ``<name><i>`` belongs to ``plan.configs[i]``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import Format, HaloConfig, Scaling, storage_dtype
from ..gemm import MULTIPLE
from ..hadamard import hadamard_transform
from ..operands import levels_of, rotation_block
from ..ops.reference import QMAX
from ..quantize import Quantized, quantize
from .batches import Sample
from .operands import blocks_of, has_blocks, round_blocks, round_parts, values_of
from .plan import Plan, changes, folds
from .statistics import (
    HISTOGRAM_ROWS,
    Names,
    Reduced,
    exponents_reduced,
    outliers_reduced,
    product_reduced,
    rounding_reduced,
    sample_outliers,
    scale_reduced,
)


def reduce_inputs(plan: Plan, t: Sample) -> list[Reduced]:
    """amax, rms, crest, nonfinite and outliers of X and W, and the first three of them as operands.

    Args:
        t: ``{x,w}_rows`` [L, 3, R] and ``{x,w}_columns`` [L, 2, K], moments; where the own config changes X and W
            ``{x,w}_scale`` [L, R], scales of the operand; where it equalises ``{x,w}_factor`` [L, K], what multiplies the columns.
    """
    found = []
    for name in ("x", "w"):
        rows, columns = t[f"{name}_rows"], t[f"{name}_columns"]
        if plan.own is None:
            found += _whole((name,), rows, columns)
        elif not changes(plan.own):
            found += _whole((name, f"{name}_operand"), rows, columns)
        else:
            found += _whole((name,), rows, columns)
            # A row of zeros has scale 1.
            amax = torch.where(rows[:, 0] == 0, 0.0, t[f"{name}_scale"] * _largest(plan.own.format)).amax(-1)
            squares = columns[:, 1]
            if f"{name}_factor" in t:
                squares = squares * t[f"{name}_factor"].square()
            count = rows.shape[-1] * _width(columns.shape[-1], plan.own)
            found.append(scale_reduced(((f"{name}_operand",),), amax[:, None], squares[:, None], count))
    return found


def reduce_gradients(plan: Plan, t: Sample) -> list[Reduced]:
    """The same of E, and of E as it is rounded for dgrad and wgrad.

    Args:
        t: ``e_rows`` [L, 3, M] and ``e_columns`` [L, 2, N], moments. Where the own config has row scales ``x_scale`` [L, M], those
            of X; where W's are folded ``fold`` [L, N]. Of a folded or rotated operand of dgrad ``dgrad_amax`` [L].
    """
    rows, columns, own = t["e_rows"], t["e_columns"], plan.own
    if own is None:
        return _whole(("e",), rows, columns)
    as_it_is, found, count = ["e"], [], rows.shape[-1] * columns.shape[-1]
    if "dgrad_amax" in t:
        squares = columns[:, 1] * t["fold"].double().square() if "fold" in t else columns[:, 1]
        found.append(
            scale_reduced((("e_dgrad_operand",),), t["dgrad_amax"][:, None].double(), squares[:, None], count)
        )
    else:
        as_it_is.append("e_dgrad_operand")
    if own.scaling is Scaling.ROWWISE:
        scale = t["x_scale"].double()
        amax, squares = (rows[:, 0] * scale).amax(-1), rows[:, 2] * scale.square()
        found.append(scale_reduced((("e_wgrad_operand",),), amax[:, None], squares[:, None], count))
    else:
        as_it_is.append("e_wgrad_operand")
    return found + _whole(tuple(as_it_is), rows, columns)


def reduce_fprop(plan: Plan, t: Sample) -> list[Reduced]:
    """The product fprop; rounding, histogram and outliers of the rows of X and W.

    Args:
        t: ``rows`` [L, S + P, K], of X and below them of W; ``tokens`` [L, S], which those of X are; for configs that equalise
            ``d`` and ``inverse`` [L, K]; for those with one scale a tensor ``x_amax`` [L, M] and ``w_amax`` [L, N], of the rows.
            Where they also change X and W ``data<i>`` [L, S + P, K'] and ``scale<i>`` [L, S + P], the rows rounded.
    """
    rows, own = t["rows"], plan.own
    (_, both, columns), count = rows.shape, t["tokens"].shape[1]
    plain = equalized = _padded(rows)
    if "d" in t:
        scaled = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, t["d"].dtype))
        torch.mul(rows[:, :count], t["inverse"][:, None], out=scaled[:, :count])
        torch.mul(rows[:, count:], t["d"][:, None], out=scaled[:, count:])
        equalized = _padded(scaled)

    def rounded(config: HaloConfig) -> Quantized:
        if config.scaling is Scaling.ROWWISE:
            rows = equalized if config.equalize else plain
            return quantize(rows, config.format, block=rotation_block(rows.shape[-1], config))
        lengths = {"x": count, "w": both - count}
        amax = [t[f"{name}_amax"].amax(-1, keepdim=True).expand(-1, n) for name, n in lengths.items()]
        return round_parts(plain, torch.cat(amax, 1), config.format)

    found, products = [], []
    for i, config in enumerate(plan.configs):
        q = Quantized(t[f"data{i}"], t[f"scale{i}"]) if f"data{i}" in t else rounded(config)
        data, scale = q.data.double(), q.scale.double()
        product = data[:, :count] @ data[:, count:].mT
        products.append(product.mul_(scale[:, :count, None]).mul_(scale[:, None, count:]))
        if config == own and changes(config):
            before = equalized if config.equalize else plain
            if config.rotate_k:
                before = hadamard_transform(before.to(torch.promote_types(before.dtype, torch.float32)))
            width = _width(columns, config)
            for part in _Rows.of_both(("x_operand", "w_operand"), count, width, before, q):
                found += part.reduced(config.format, outliers=part.names)
    exact = plain.double()
    product = exact[:, :count] @ exact[:, count:].mT
    found.append(product_reduced(plan.names("fprop"), product[:, None], torch.stack(products, 1)))
    if own is not None:
        q = rounded(dataclasses.replace(own, rotate_k=False, equalize=False))
        for part in _Rows.of_both(("x", "w"), count, columns, plain, q):
            if changes(own):
                found += part.reduced(own.format)
            else:
                operands = tuple((f"{name}_operand",) for (name,) in part.names)
                names = tuple((*a, *b) for a, b in zip(part.names, operands, strict=True))
                found += part._replace(names=names).reduced(own.format, outliers=operands)
    return found


def reduce_dgrad(plan: Plan, t: Sample) -> list[Reduced]:
    """The product dgrad; rounding, histogram and outliers of the rows of E that are its operand.

    Args:
        t: ``e`` [L, S, N], rows of E; ``w`` [L, N, C], columns of W; ``w_amax`` [L, N] and, for configs with one scale a tensor,
            ``e_amax`` [L, M], of the rows. Where W has a scale for each tile ``data<i>`` [L, C, N'] and ``tiles<i>`` [L, blocks, C], its
            columns rounded. Where dgrad takes the W of fprop, changed, ``values<i>`` [L, N, C], what its data stands for;
            there and where W has levels ``scale<i>`` [L, N]. Where E is rotated ``e_values<i>`` [L, S, N], rotated back, and of the own config ``e_exact`` and
            ``e_data`` [L, S, N] and ``e_scale`` [L, S].
    """
    e, own, found, products = t["e"], plan.own, [], []
    for i, config in enumerate(plan.configs):
        multiplied, fold = _dgrad_weight(t, i, config)
        if config.rotate_m_dgrad:
            products.append(t[f"e_values{i}"].double() @ multiplied)
        else:
            folded, q = _round_gradient(e, fold, t, plan, i)
            products.append(_product(q, multiplied))
        if config != own:
            continue
        if config.rotate_m_dgrad:
            folded, q = t["e_exact"], Quantized(t["e_data"], t["e_scale"])
        operand = _Rows.of("e_dgrad_operand", folded, q)
        if folded is e:
            both = operand._replace(names=(("e", "e_dgrad_operand"),))
            found += both.reduced(config.grad_format, outliers=operand.names)
        else:
            found += operand.reduced(config.grad_format, outliers=operand.names)
            found += _Rows.of("e", *_round_gradient(e, None, t, plan, i)).reduced(config.grad_format)
    product = e.double() @ t["w"].double()
    found.append(product_reduced(plan.names("dgrad"), product[:, None], torch.stack(products, 1)))
    return found


def reduce_wgrad(plan: Plan, t: Sample) -> list[Reduced]:
    """The product wgrad; rounding, histogram and outliers of the columns of E that are its operand.

    Args:
        t: ``e`` [L, P, M], rows of the transpose of E; ``x`` [L, M, C], columns of X; ``x_amax`` and, for configs with one scale a tensor, ``e_amax``
            [L, M], of the rows. Where X is changed ``scale<i>`` [L, M], and ``error<i>`` [L, M, C], rounded minus exact, or for a wgrad by
            columns ``data<i>`` [L, C, M'] and ``tiles<i>`` [L, blocks, C], those rounded.
    """
    e = t["e"]
    x, found, products = t["x"].double(), [], []
    for i, config in enumerate(plan.configs):
        rowwise = config.scaling is Scaling.ROWWISE
        # Row scales of X are in E: what it meets is the data alone.
        if plan.forms[i].by_columns:
            multiplied, scale = _rounded_columns(t, i, e.shape[-1]), t[f"scale{i}"]
        elif f"error{i}" in t:
            multiplied, scale = x + t[f"error{i}"], t[f"scale{i}"]
            multiplied = multiplied / scale[..., None] if rowwise else multiplied
        else:
            q = _round_with(t["x"], t["x_amax"], config)
            multiplied, scale = q.data.double() if rowwise else values_of(q), q.scale
        rows, q = _round_gradient(e, scale if rowwise else None, t, plan, i)
        products.append(_product(q, multiplied))
        if config == plan.own:
            operand = _Rows.of("e_wgrad_operand", rows, q)
            found += operand.reduced(config.grad_format, outliers=operand.names)
    # Columns of dW stand where the other products have tokens.
    product, rounded = (e.double() @ x).mT, torch.stack(products, 1).mT
    found.append(product_reduced(plan.names("wgrad"), product[:, None], rounded))
    return found


class _Rows(NamedTuple):
    """Sampled rows of T tensors of each layer."""

    names: Names
    before: Tensor
    """Values before rounding, [L, T, R, Q]."""
    data: Tensor
    """What is stored of them, likewise."""
    scale: Tensor
    """Of the rows, [L, T, R], or of their blocks, [L, T, blocks, R]."""

    @staticmethod
    def of(name: str, before: Tensor, q: Quantized) -> _Rows:
        """Of one tensor, [L, R, Q]."""
        return _Rows(((name,),), *(t[:, None] for t in (before, q.data, q.scale)))

    @staticmethod
    def of_both(names: tuple[str, str], count: int, width: int, before: Tensor, q: Quantized) -> list[_Rows]:
        """Of two that stand one below the other, [L, count + R, >= width]: together where they have equally many rows."""
        parts = (before[..., :width], q.data[..., :width], q.scale)
        first, second = ((name,) for name in names)
        if before.shape[1] == 2 * count:
            return [_Rows((first, second), *(t.unflatten(1, (2, count)) for t in parts))]
        return [
            _Rows((first,), *(t[:, None, :count] for t in parts)),
            _Rows((second,), *(t[:, None, count:] for t in parts)),
        ]

    def reduced(self, fmt: Format, outliers: Names = ()) -> list[Reduced]:
        """Rounding and histogram, and under the names of ``outliers`` those."""
        shape = self.before.shape
        before, data, scale = (t.flatten(0, 1) for t in (self.before, self.data, self.scale))
        counted = max(1, shape[2] // HISTOGRAM_ROWS)
        moments = _block_moments if has_blocks(Quantized(data, scale)) else ops.rounding_moments
        sums = moments(before, data, scale, _largest(fmt), counted)
        of_rows, of_columns, exponents = (s.unflatten(0, shape[:2]) for s in sums)
        found = [
            rounding_reduced(self.names, of_rows, shape[-1]),
            exponents_reduced(self.names, exponents),
        ]
        return found + sample_outliers(outliers, of_rows, of_columns) if outliers else found


def _block_moments(
    x: Tensor, data: Tensor, scale: Tensor, largest: float, counted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ops.rounding_moments` of rows with a scale for each block, [B, blocks, R]."""
    sums = ops.rounding_moments(blocks_of(x), blocks_of(data), scale.flatten(0, 1), largest, counted)
    of_rows, of_columns, exponents = (s.unflatten(0, scale.shape[:2]) for s in sums)
    columns = of_columns.transpose(1, 2).flatten(2)[..., : x.shape[-1]]
    return of_rows.sum(1), columns, exponents.sum(1, dtype=exponents.dtype)


def _product(rows: Quantized, multiplied: Tensor) -> Tensor:
    """Rounded rows [L, R, Q] times float64 [L, Q, C]; where a row has one scale, only the data is multiplied."""
    if has_blocks(rows):
        return values_of(rows) @ multiplied
    return (rows.data.double() @ multiplied).mul_(rows.scale.double()[..., None])


def _whole(names: tuple[str, ...], rows: Tensor, columns: Tensor) -> list[Reduced]:
    """Of tensors as they are, the first name, and of others that have the same amax, rms and crest."""
    count = rows.shape[-1] * columns.shape[-1]
    scale = scale_reduced((names,), rows[:, :1].amax(-1), columns[:, 1:], count)
    by_row, by_column = (rows[:, 2:], rows[:, 1:2]), (columns[:, 1:], columns[:, :1])
    return [scale, *outliers_reduced((names[:1],), by_row, by_column)]


def _dgrad_weight(t: Sample, i: int, config: HaloConfig) -> tuple[Tensor, Tensor | None]:
    """What E meets in dgrad [L, N, C], and what [L, N] is folded into E before: row scales of W, or its levels."""
    if f"tiles{i}" in t:
        return _rounded_columns(t, i, t["w"].shape[1]), None
    if config.requantize_w_dgrad:
        if not config.levels_w_dgrad:
            return values_of(quantize(t["w"].mT, config.format)).mT, None
        scale = t[f"scale{i}"] if f"scale{i}" in t else _round_with(t["w"], t["w_amax"], config).scale
        levels = levels_of(scale, config)
        assert levels is not None
        return values_of(quantize((t["w"] / levels[..., None]).mT, config.format)).mT, levels
    if f"values{i}" in t:
        values, scale = t[f"values{i}"].double(), t[f"scale{i}"]
    else:
        q = _round_with(t["w"], t["w_amax"], config)
        values, scale = q.data.double(), q.scale
    return (values, scale) if folds(config) else (values * scale.double()[..., None], None)


def _round_with(columns: Tensor, amax: Tensor, config: HaloConfig) -> Quantized:
    """Columns [L, R, C] of X or W as they are, whose rows have the largest magnitudes amax [L, R]."""
    if config.scaling is Scaling.TENSORWISE:
        amax = amax.amax(-1, keepdim=True).expand_as(amax)
    return round_parts(columns, amax, config.format)


def _rounded_columns(t: Sample, i: int, rows: int) -> Tensor:
    """What columns of X or W with scales for tiles stand for [L, R, C], without padded rows."""
    return values_of(Quantized(t[f"data{i}"], t[f"tiles{i}"]))[..., :rows].mT


def _round_gradient(
    e: Tensor, factors: Tensor | None, t: Sample, plan: Plan, i: int
) -> tuple[Tensor, Quantized]:
    """Rows [L, R, Q] of E or of its transpose times factors [L, Q] of their columns, and the same rounded."""
    config = plan.configs[i]
    rows = e if factors is None else e * factors[:, None]
    if plan.forms[i].in_blocks:
        return rows, round_blocks(e, factors, config.grad_format)
    if config.scaling is Scaling.ROWWISE:
        return rows, quantize(rows, config.grad_format)
    amax = t["e_amax"].amax(-1, keepdim=True).expand(rows.shape[:2])
    return rows, round_parts(rows, amax, config.grad_format)


def _padded(rows: Tensor) -> Tensor:
    extra = -rows.shape[-1] % MULTIPLE
    return F.pad(rows, (0, extra)) if extra else rows


def _width(columns: int, config: HaloConfig) -> int:
    """Columns of an operand: a rotation fills the padded ones too."""
    return columns + (-columns % MULTIPLE if config.rotate_k else 0)


def _largest(fmt: Format) -> float:
    return QMAX.get(storage_dtype(fmt, torch.float32), 1.0)
