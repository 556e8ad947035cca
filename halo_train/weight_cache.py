"""The rounded weight of a layer, kept from one micro-batch to the next while it cannot have changed.

It costs two bytes a weight, one with a folded dgrad, and only where it pays: from the second micro-batch of an optimiser
step in which a layer sees several, and while that goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .quantize import RoundedWeight

_optimizer_steps = 0
"""Steps of any torch.optim.Optimizer: fused steps, and those of other libraries, write weights without a new version."""


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps the optimisers of this process have made."""
    return _optimizer_steps


class WeightCache:
    """At most one rounded weight, and what it was made from.

    A change is seen through the version of the tensors, their memory and the steps of optimisers. Writing through
    ``weight.data`` changes none of these. So a kept weight is used only where nobody writes one: inside a backward pass,
    and in training between micro-batches, which for a weight that is trained means that it has a gradient already.
    A copy or a pickle of a layer starts empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets the weight and its memory."""
        self._weight: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._value: RoundedWeight | None = None
        self._pays = False
        self._begun: int | None = None
        """Optimiser steps before the first micro-batch of this step, from which nothing is kept."""

    def get(
        self,
        weight: Tensor,
        made_from: tuple[Any, ...],
        exponent: Tensor,
        training: bool,
        stream: int | None,
        make: Callable[[], RoundedWeight],
    ) -> RoundedWeight | None:
        """The rounded weight if this is a place to keep it or to have it kept, else None: round it where it is used.

        Args:
            weight: the parameter.
            made_from: what else ``make`` depends on, compared by value.
            exponent: a tensor that ``make`` depends on too, compared by memory and version.
            training: whether the layer is in training mode.
            stream: :func:`halo_train.reuse.keeping_stream` of exponent.
            make: rounds the weight.
        """
        # A subclass or a plain tensor in the place of the parameter belongs to FSDP, DataParallel or functional_call.
        if stream is None or type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and not (training and torch.is_grad_enabled()):
            self.clear()
            return None
        first = weight.grad is None and weight.requires_grad
        if first and not self._pays and self._value is None:
            # As in every call of a training without accumulation, of which no more is asked.
            if not in_backward:
                self._begun = _optimizer_steps
            return None
        state = (weight._version, weight.data_ptr(), weight.dtype, weight.shape)
        key = (_optimizer_steps, made_from, stream, state, exponent._version, exponent.data_ptr())
        unchanged = self._weight is not None and self._weight() is weight and key == self._key
        if in_backward:
            return self._value if unchanged else None
        if unchanged and not first:
            self._pays = True
        elif not first and self._begun == _optimizer_steps:
            self.clear()
            self._weight, self._key, self._pays = weakref.ref(weight), key, True
        else:
            # The first micro-batch of a step: worth keeping if the last step had more than one.
            keep = self._pays
            self.clear()
            self._weight, self._key = weakref.ref(weight), key
            if not keep:
                return None
        if self._value is None:
            with torch.no_grad():
                self._value = make()
        return self._value

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()
