"""Samples of many layers, reduced together: kernel launches, not arithmetic, would otherwise be most of the cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantize import Quantized
from ..reference import QMAX
from .statistics import (
    Reduction,
    WholeTensor,
    exponent_reductions,
    outlier_reductions,
    product_reductions,
    rounding_reductions,
)

FULL = 1 << 24
"""Elements of samples of one kind that wait before they are reduced."""


class _Sample(NamedTuple):
    found: list[list[Reduction]]
    """Where the reductions go, one list for each tensor or product."""
    tensors: tuple[Tensor, ...]


_Reduce = Callable[..., list[list[Reduction]]]
"""Stacked tensors to the reductions of each list, sample by sample."""


class Batches:
    """Collects samples of equal shape and dtype and reduces them when :data:`FULL` elements are there, or by flush()."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, tuple[_Reduce, list[_Sample]]] = {}

    def add_tensor(self, found: list[Reduction], exact: Tensor, rounded: Quantized, width: int) -> None:
        """Rounding stats and the histogram of sampled rows of a tensor.

        Args:
            found: the reductions are appended to it, no later than by flush().
            exact: [R, Q]. rounded: the same rows in 8 bits, data [R, Q], scale [R].
            width: columns without padding.
        """
        self._add(_reduce_tensors, [found], exact[:, :width], rounded.data[:, :width], rounded.scale)

    def add_operand(self, found: list[Reduction], exact: Tensor, rounded: Quantized, width: int) -> None:
        """As :meth:`add_tensor`, with the outlier stats of the sampled rows: a whole operand is nowhere."""
        self._add(_reduce_operands, [found], exact[:, :width], rounded.data[:, :width], rounded.scale)

    def add_product(self, found: list[list[Reduction]], blocks: Tensor) -> None:
        """Stats of T roundings of one product.

        Args:
            found: T lists. blocks: [1 + T, R, Q] float64, the first exact.
        """
        self._add(_reduce_products, found, blocks)

    def add_operand_scale(
        self,
        found: list[Reduction],
        whole: WholeTensor,
        rounded: Quantized,
        factor: Tensor | None,
        width: int,
    ) -> None:
        """amax, RMS and crest of X or W as it is rounded, from its scales and the norms of its columns.

        Args:
            whole: of the matrix [R, K] as it is.
            rounded: scale [R'] or []; rows beyond R are padding.
            factor: what equalisation multiplies the columns by, [K], or None.
            width: columns of the operand: a rotation fills the padded ones too.
        """
        rows = len(whole.row_amax)
        scale = rounded.scale[:rows] if rounded.scale.dim() else rounded.scale.expand(rows)
        reduce = _operand_scale(QMAX.get(rounded.data.dtype, 1.0), rows * width)
        factors = () if factor is None else (factor,)
        self._add(reduce, [found], whole.row_amax, scale, whole.col_square, *factors)

    def add_folded_scale(
        self, found: list[Reduction], amax: Tensor, squares: Tensor, fold: Tensor, count: int
    ) -> None:
        """amax, RMS and crest of E with its rows or columns scaled.

        Args:
            amax, squares: [R], the largest magnitude and the sum of squares of each of them. fold: [R], what scales them.
            count: elements of E.
        """
        self._add(_folded_scale(count), [found], amax, squares, fold)

    def flush(self) -> None:
        """Reduces what waits."""
        for key in list(self._waiting):
            self._reduce(key)

    def _add(self, reduce: _Reduce, found: list[list[Reduction]], *tensors: Tensor) -> None:
        key = (reduce, *((t.shape, t.dtype, t.device) for t in tensors))
        _, samples = self._waiting.setdefault(key, (reduce, []))
        samples.append(_Sample(found, tensors))
        if len(samples) * tensors[0].numel() >= FULL:
            self._reduce(key)

    def _reduce(self, key: Hashable) -> None:
        reduce, samples = self._waiting.pop(key)
        stacked = [_stack(parts) for parts in zip(*(sample.tensors for sample in samples), strict=True)]
        lists = [found for sample in samples for found in sample.found]
        for found, reductions in zip(lists, reduce(*stacked), strict=True):
            found += reductions


def _reduce_tensors(exact: Tensor, data: Tensor, scale: Tensor) -> list[list[Reduction]]:
    before = exact.double()
    # bfloat16 holds every 8-bit value.
    values = data.bfloat16() if data.element_size() == 1 else data
    after = values * scale.double().reshape(len(exact), -1, 1)
    saturated = values.abs() >= QMAX.get(data.dtype, 1.0)
    kinds = (rounding_reductions(before, after, saturated), exponent_reductions(exact))
    return [list(found) for found in zip(*kinds, strict=True)]


def _reduce_operands(exact: Tensor, data: Tensor, scale: Tensor) -> list[list[Reduction]]:
    before = exact.double()
    kinds = (_reduce_tensors(before, data, scale), outlier_reductions(before))
    return [a + b for a, b in zip(*kinds, strict=True)]


def _reduce_products(blocks: Tensor) -> list[list[Reduction]]:
    return [[found] for found in product_reductions(blocks[:, :1], blocks[:, 1:])]


# Cached: samples wait together whose way of being reduced is the same object.


@functools.cache
def _operand_scale(largest: float, count: int) -> _Reduce:
    def reduce(row_amax: Tensor, scale: Tensor, squares: Tensor, *factors: Tensor) -> list[list[Reduction]]:
        # A row of zeros has scale 1.
        amax = torch.where(row_amax == 0, 0.0, scale * largest).amax(-1)
        for factor in factors:
            squares = squares * factor.square()
        return _scales(amax, squares, count)

    return reduce


@functools.cache
def _folded_scale(count: int) -> _Reduce:
    def reduce(amax: Tensor, squares: Tensor, fold: Tensor) -> list[list[Reduction]]:
        return _scales((amax * fold).amax(-1), squares * fold.double().square(), count)

    return reduce


def _scales(amax: Tensor, squares: Tensor, count: int) -> list[list[Reduction]]:
    sums = (amax, squares.sum(-1, keepdim=True))
    return [[Reduction("scale", sums, count, i)] for i in range(len(amax))]


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    # Not every device can stack float8.
    if tensors[0].element_size() == 1:
        return torch.stack([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)
    return torch.stack(tensors)
