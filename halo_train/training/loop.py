"""The parts of a training loop: device, length, validation, stopping on a signal."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable
from types import FrameType, TracebackType

import torch

from .config import TrainSection
from .data import Batch, batches_per_epoch
from .errors import UserError
from .loss import TokenLoss


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


@torch.no_grad()
def evaluate(loss: TokenLoss, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean loss per trained token, in nats, in evaluation mode."""
    was_training = loss.training
    loss.eval()
    total, trained = 0.0, 0
    for batch in batches:
        total += loss(**batch.inputs(device)).item()
        trained += batch.trained
    loss.train(was_training)
    return total / trained


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
