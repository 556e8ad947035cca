"""The parts of a training loop: device, length, validation, stopping on a signal."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable
from types import FrameType, TracebackType

import torch

from halo_train import collect_equalizers

from .config import TrainSection
from .data import Batch, batches_per_epoch
from .distributed import Ranks
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
def evaluate(
    loss: TokenLoss, batches: Iterable[Batch], device: torch.device, ranks: Ranks | None = None
) -> float:
    """Mean loss per trained token, in nats, in evaluation mode.

    Args:
        ranks: processes that share the batches; None is this one alone.
    """
    ranks = ranks or Ranks(0, 1, device)
    was_training = loss.training
    loss.eval()
    total, trained = 0.0, 0
    for batch, counts in ranks.share(batches):
        value = loss(**batch.inputs(device)).item()
        if counts:
            total += value
            trained += batch.trained
    loss.train(was_training)
    whole, tokens = ranks.sums([total, trained])
    return whole / tokens


def prepare_equalizers(loss: TokenLoss, batches: Iterable[Batch], device: torch.device) -> None:
    """Has the layers take their equalisation factors from ``batches``, what this process has of the first step, and from what the others
    have: the same factors on any number of processes. In evaluation mode, so without dropout and the random numbers of the run.
    """
    was_training = loss.training
    loss.eval()
    with collect_equalizers(loss):
        for batch in batches:
            loss(**batch.inputs(device))
    loss.train(was_training)


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
    """While active, the first SIGINT or SIGTERM only sets :attr:`received`; a second one interrupts at once.

    torchrun passes on what the terminal has already sent to every process: within a second of the first it is the same one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0

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
        now = time.monotonic()
        if self.received is not None and now - self._at > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._at = number, now
