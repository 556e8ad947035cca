"""Errors that the command line prints as one message instead of a traceback, and the exit code of each."""

from __future__ import annotations

import errno
import signal

import torch

_LESS_MEMORY = (
    "Lower train.micro_batch (and raise train.grad_accum) or data.seq_len, or set quant.recompute=mlp, "
    "train.activation_checkpointing=full, model.dtype=bfloat16 or train.optimizer=adamw_8bit; in eval lower --batch"
)


class UserError(ValueError):
    """Something the user can put right: a wrong key, a missing file, a directory that exists. Exit code 2."""

    exit_code = 2


class RunFailed(RuntimeError):
    """A run that started well and cannot go on: a non-finite loss, a full disk. Exit code 1."""

    exit_code = 1


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM stopped the run after its last step was saved. Exit code 128 + signal number, as shells do."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
        self.signal_name = signal.Signals(signum).name


def what_is_full(error: Exception) -> RunFailed | None:
    """What to say where the memory of a GPU or a disk is full; None of any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return RunFailed(f"{str(error).partition(' GPU ')[0]} {_LESS_MEMORY}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        file = f" for {error.filename}" if error.filename else ""
        return RunFailed(
            f"no space is left on the disk{file}; checkpoints that were saved are whole; make room and repeat the command to go on"
        )
    return None
