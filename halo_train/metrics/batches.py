"""Samples of many layers, reduced together: kernel launches, not arithmetic, would otherwise be most of the cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import bytes_of
from .plan import Plan
from .statistics import Reduced

FULL = 1 << 24
"""Elements of the largest tensor of each kind of sample that wait before they are reduced."""

Sample = dict[str, Tensor]
"""Tensors of a layer by name; in a reduction those of L layers, stacked."""

Reduce = Callable[[Plan, Sample], list[Reduced]]


class _Waiting(NamedTuple):
    reduce: Reduce
    plan: Plan
    layers: list[str]
    samples: list[Sample]


class Batches:
    """Collects samples of one plan and of equal shapes, and reduces them when :data:`FULL` elements are there, or by flush().

    Attributes:
        found: names of the layers, and what their samples were reduced to.
    """

    def __init__(self) -> None:
        self.found: list[tuple[list[str], Reduced]] = []
        self._waiting: dict[Hashable, _Waiting] = {}

    def add(self, layer: str, reduce: Reduce, plan: Plan, sample: Sample) -> None:
        """Takes a sample of a layer; it is reduced no later than by flush()."""
        key = (reduce, plan, *((name, t.shape, t.dtype, t.device) for name, t in sample.items()))
        waiting = self._waiting.setdefault(key, _Waiting(reduce, plan, [], []))
        waiting.layers.append(layer)
        waiting.samples.append(sample)
        if len(waiting.layers) * max(t.numel() for t in sample.values()) >= FULL:
            self._reduce(key)

    def flush(self) -> None:
        """Reduces what waits."""
        for key in list(self._waiting):
            self._reduce(key)

    def _reduce(self, key: Hashable) -> None:
        reduce, plan, layers, samples = self._waiting.pop(key)
        stacked = {name: _stack([sample[name] for sample in samples]) for name in samples[0]}
        self.found += [(layers, reduced) for reduced in reduce(plan, stacked)]


def _stack(tensors: list[Tensor]) -> Tensor:
    # Not every device can stack float8.
    return torch.stack([bytes_of(t) for t in tensors]).view(tensors[0].dtype)
