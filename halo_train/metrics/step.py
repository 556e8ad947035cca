"""One sampled step: the hooks that measure each layer in its first forward with gradients, and what they found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..config import HaloConfig
from ..linear import HaloLinear, OperandHook
from .batches import Batches
from .operands import Draws
from .plan import Plan
from .probe import LayerProbe
from .sample import SampleSize


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
        self._pending: dict[str, LayerProbe] = {}
        self._draws: dict[torch.device, Draws] = {}

    def hook(self, name: str) -> OperandHook:
        """For the layer of this name."""

        def on_grad(e: Tensor) -> None:
            probe = self._pending.pop(name, None)
            if probe is not None:
                with torch.no_grad(), torch.autocast(e.device.type, enabled=False):
                    probe.backward(e.detach().reshape(-1, e.shape[-1]))
                self.measured.add(name)

        def on_forward(layer: HaloLinear, x: Tensor, y: Tensor) -> None:
            # The first forward with gradients; activation checkpointing runs it again.
            if name in self._pending or name in self.measured or not y.requires_grad or y.numel() == 0:
                return
            x = x.detach().reshape(-1, layer.in_features).to(y.dtype)
            # Selective activation checkpointing is a mode that would take our ops for those of the layer.
            with _disable_current_modes(), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                plan, draws = self._plan_of(layer.running_config), self._draws_on(x.device)
                self._pending[name] = LayerProbe(name, layer, x, plan, draws, self.batches)
            y.register_hook(on_grad)

        return on_forward

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
