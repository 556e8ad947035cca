"""The parts of a training loop: loss, optimizer, learning rate, validation, stopping on a signal."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from types import FrameType, TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TrainSection
from .data import IGNORE, batches_per_epoch
from .errors import UserError

BETAS = (0.9, 0.95)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UserError: ``cuda`` where PyTorch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device=cuda, but PyTorch sees no GPU; `halo-train doctor` shows why; or set train.device=cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def summed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over the labels that carry loss; bfloat16 autocast, loss in float32.

    Args:
        ids, labels: [B, S] as from :func:`halo_train.training.data.collate`, on the device of the model.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def count_trained(labels: Tensor) -> int:
    """Labels that :func:`summed_loss` sums over."""
    return int((labels[:, 1:] != IGNORE).sum())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean loss per trained token, in nats, in evaluation mode."""
    was_training = model.training
    model.eval()
    total, trained = 0.0, 0
    for ids, labels in batches:
        total += summed_loss(model, ids.to(device), labels.to(device)).item()
        trained += count_trained(labels)
    model.train(was_training)
    return total / trained


def adamw(model: nn.Module, train: TrainSection) -> torch.optim.AdamW:
    """AdamW over the parameters that need a gradient; no weight decay on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.lr, betas=BETAS, fused=True
    )


def total_steps(train: TrainSection, rows: int) -> int:
    """Optimiser steps of a run on ``rows`` training rows; the last epoch is rounded up to a whole step.

    Raises:
        UserError: fewer rows than one batch; the warm-up is longer than the run.
    """
    batches = batches_per_epoch(rows, train.micro_batch)
    if train.epochs is None:
        assert train.steps is not None  # TrainSection: exactly one of them
        return train.steps
    steps = math.ceil(train.epochs * batches / train.grad_accum)
    if train.warmup_steps >= steps:
        raise UserError(
            f"train.warmup_steps must be less than the {steps} steps of train.epochs={train.epochs}; got "
            f"{train.warmup_steps}"
        )
    return steps


def learning_rate(step: int, steps: int, train: TrainSection) -> float:
    """Of optimiser step ``step`` (the first is 1) of ``steps``: linear warm-up to ``train.lr``, then decay to zero after the last."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    done = (step - 1 - train.warmup_steps) / (steps - train.warmup_steps)
    return train.lr * (0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done)


class StopSignals:
    """While active, the first SIGINT or SIGTERM only sets :attr:`received`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
