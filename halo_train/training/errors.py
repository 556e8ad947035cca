"""Errors that the command line prints as one message instead of a traceback, and the exit code of each."""

from __future__ import annotations

import signal

LESS_MEMORY = (
    "Lower train.micro_batch (and raise train.grad_accum) or data.seq_len, or set train.activation_checkpointing=full, "
    "model.dtype=bfloat16 or train.optimizer=adamw_8bit; in eval lower --batch"
)
"""What helps where the memory of a GPU is full."""


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
