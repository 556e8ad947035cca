"""One sampled step: the hooks that measure each layer in its first forward with gradients, and what they found."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..config import HaloConfig
from ..linear import HaloLinear, OperandHook
from ..operands import makes_both
from .batches import Batches
from .operands import Draws
from .plan import Form, Plan
from .probe import InputProbe, LayerProbe, equalizer_of
from .sample import SampleSize


class _Read(NamedTuple):
    """A tensor that layers read; the probe dies with the next, or with the step."""

    x: weakref.ref[Tensor]
    state: tuple[object, ...]
    """Of the tensor, and what else the probe depends on."""
    probe: InputProbe


class SampledStep:
    """What the layers show between two calls of ``QuantMetrics.step``.

    Args:
        size: of the sample.
        seed: of the rows and columns that are drawn.
        plan_of: the recipes that a running config is measured with; one plan for equal configs.

    Attributes:
        measured: names of the layers that ran forward and backward.
        batches: their samples.
    """

    def __init__(self, size: SampleSize, seed: int, plan_of: Callable[[HaloConfig], Plan]) -> None:
        self.measured: set[str] = set()
        self.batches = Batches()
        self._size, self._seed, self._plan_of = size, seed, plan_of
        self._in_forms = functools.cache(Plan.in_forms)
        self._pending: dict[str, LayerProbe] = {}
        self._draws: dict[torch.device, Draws] = {}
        self._read: _Read | None = None

    def hook(self, name: str) -> OperandHook:
        """For the layer of this name."""

        def on_grad(e: Tensor) -> None:
            probe = self._pending.pop(name, None)
            if probe is not None:
                with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
                    probe.backward(e.detach().reshape(-1, e.shape[-1]))
                self.measured.add(name)

        def on_forward(layer: HaloLinear, x: Tensor, y: Tensor, column_features: int) -> None:
            # The first forward with gradients; activation checkpointing runs it again.
            if name in self._pending or name in self.measured or not y.requires_grad or y.numel() == 0:
                return
            plan, draws = self._plan_of(layer.running_config), self._draws_on(x.device)
            if makes_both(x, layer.weight):
                plan = self._in_forms(
                    plan, tuple(Form.of(x, column_features, config) for config in plan.configs)
                )
            # Selective activation checkpointing is a mode that would take our ops for those of the layer.
            with _disable_current_modes(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                tokens = x.detach().reshape(-1, layer.in_features).to(y.dtype)
                weight = layer.whole_weight()
                block = draws.block(len(tokens), *weight.shape)
                read = self._input_of(layer, x, tokens, weight, plan, draws)
                self._pending[name] = LayerProbe(name, tokens, weight, read, plan, draws, block, self.batches)
            y.register_hook(on_grad)

        return on_forward

    def _input_of(
        self, layer: HaloLinear, x: Tensor, tokens: Tensor, weight: Tensor, plan: Plan, draws: Draws
    ) -> InputProbe:
        """That of the layer before where both read x and take the same factors; tokens: x as the layer multiplies it."""
        # Layers of one group take their factors together.
        factors = layer.joint if layer.config.equalize and layer.equalizer_taken else None
        state = (None if x.is_inference() else x._version, tokens.dtype, plan, factors)
        known = self._read
        shareable = factors is not None or not plan.equalizes
        if known is not None and shareable and known.x() is x and known.state == state:
            return known.probe
        probe = InputProbe(tokens, equalizer_of(layer, tokens, weight, plan), plan, draws)
        self._read = _Read(weakref.ref(x), state, probe)
        return probe

    def _draws_on(self, device: torch.device) -> Draws:
        if device not in self._draws:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._draws[device] = Draws(self._size, generator)
        return self._draws[device]


def run_compiled_regions_eagerly() -> Callable[[], None]:
    """Until the function that it returns is called, and all others like it.

    A stance of torch restores the one that it found, so that those of two models, which need not nest, would leave each other's.
    """
    global _sampled_steps
    if _sampled_steps == 0:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _sampled_steps += 1
    return _end_sampled_step


def _end_sampled_step() -> None:
    global _sampled_steps
    _sampled_steps -= 1
    if _sampled_steps == 0:
        _stance.close()


_stance = contextlib.ExitStack()
_sampled_steps = 0
"""That are under way, of all models."""
