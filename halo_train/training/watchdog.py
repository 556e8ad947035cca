"""Where a step went non-finite: the first layer, and which of its products."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .data import Batch
from .loss import TokenLoss


class _Found(Exception):
    """Ends the step at the first value that is not finite."""


def locate_non_finite(loss: TokenLoss, batches: Iterable[Batch], device: torch.device) -> str:
    """Repeats a step while watching the inputs, outputs and gradients of every layer.

    Args:
        loss: with its model in the state that it had before the step; gradients are lost.
        batches: of the step. Compiled parts run eagerly.

    Returns:
        What was not finite first, in the order of computation, e.g. ``dgrad of model.layers.3.mlp.down_proj``.
    """
    model = loss.model
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weight {name}, before the step"
    model.zero_grad()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                for handle in _watch(module, name):
                    hooks.callback(handle.remove)
        handle = loss.register_forward_hook(lambda _, args, value: _check(value, "output layer and loss"))
        hooks.callback(handle.remove)
        hooks.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", message="Full backward hook is firing"
        )  # of an embedding: it has dW only
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for batch in batches:
                (loss(**batch.inputs(device)) / batch.trained).backward()
        except _Found as found:
            return str(found)
        finally:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            finite = all(map(_finite, gradients))
            model.zero_grad()
    if not finite:
        return "a gradient between layers"
    return "nothing when the step was repeated; a product that is not deterministic, or a fault of the device"


def _watch(module: nn.Module, name: str) -> Iterable[RemovableHandle]:
    """Hooks that raise on what is not finite. A backward that starts with a bad gradient is the fault of what came before."""
    forward, backward, weight = (
        ("fprop of", "dgrad of", "wgrad of")
        if isinstance(module, nn.Linear)
        else ("output of", "input gradient of", "weight gradient of")
    )

    def before(_: nn.Module, args: Any) -> None:
        _check(args, f"what comes before {name}, its input")

    def after(_: nn.Module, args: Any, output: Any) -> None:
        _check(output, f"{forward} {name}")

    def arriving(_: nn.Module, grad_output: Any) -> None:
        _check(grad_output, f"what comes after {name}, the gradient of its output")

    def leaving(_: nn.Module, grad_input: Any, grad_output: Any) -> None:
        _check(grad_input, f"{backward} {name}")

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)
    yield module.register_full_backward_pre_hook(arriving)
    yield module.register_full_backward_hook(leaving)
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            what = f"{weight} {name}" if part == "weight" else f"gradient of {name}.{part}"
            yield parameter.register_hook(lambda grad, what=what: _check(grad, what))


def _check(values: Any, what: str) -> None:
    tensors = values if isinstance(values, tuple) else (values,)
    if not all(_finite(t) for t in tensors if isinstance(t, Tensor)):
        raise _Found(what)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
