"""Checkpoints that a kill or a full disk cannot spoil, and that a run continues from bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from halo_train import equalizer_state_dict, load_equalizer_state_dict

from .errors import RunFailed, UserError

_NAME = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimiser steps done."""
    batches: int = 0
    """Micro-batches taken from the data."""


class CheckpointWriter:
    """Saves checkpoints to ``folder/step-N``, one at a time, and deletes all but the newest ``keep``.

    The files are written to a temporary folder, flushed to the disk and renamed, so every ``step-N`` is complete. Every
    process of a run makes a writer and calls its methods at the same places; each writes its shards, and any number of
    processes can go on from them. It is a context manager, whose end waits for the last checkpoint.

    Args:
        folder: of the run's checkpoints.
        keep: how many.
        background: ``save`` copies the state to CPU memory and returns; a thread writes the copy.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._writing: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        # Of its own: the collectives of a thread must not meet those of the training.
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self._resources = ExitStack()
        self._resources.enter_context(_single_process_is_fine())
        if background:
            self._thread = self._resources.enter_context(ThreadPoolExecutor(1, "checkpoint"))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Saves everything that the next step depends on, after the checkpoint that is being written, if any.

        Returns:
            The checkpoint; with ``background`` it is there after :meth:`wait`.

        Raises:
            RunFailed: this one, or with ``background`` the one before, could not be written.
        """
        self.wait()
        state, step = _state(model, optimizer, progress), progress.step
        if self._thread is None:
            self._write(state, step)
        else:
            self._writing = self._thread.submit(self._write, _copied(state), step)
        return self._folder / f"step-{step}"

    @property
    def failed(self) -> bool:
        """Whether :meth:`wait` is known to raise; processes learn it one after another."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint that is being written is there.

        Raises:
            RunFailed: the disk is full or not writable; earlier checkpoints are untouched. It is raised once.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._resources:
            try:
                self.wait()
            except Exception as error:
                if kind is None:
                    raise
                print(error, file=sys.stderr)  # what ends the run is the exception that it met itself

    def _write(self, state: dict[str, Any], step: int) -> None:
        target = self._folder / f"step-{step}"
        temporary = self._folder / f".unfinished-{target.name}"
        cause: OSError | CheckpointException | None = None
        try:
            if _first():
                for leftover in self._folder.glob(".unfinished-*"):
                    shutil.rmtree(leftover)
            if self._group is not None:
                distributed.barrier(self._group)
            dcp.save(state, checkpoint_id=temporary, process_group=self._group, no_dist=self._group is None)
            if _first():
                os.rename(temporary, target)
                _flush_folder(self._folder)
        except (OSError, CheckpointException) as error:
            cause = error
            shutil.rmtree(temporary, ignore_errors=True)
        message: list[str | None] = [None if cause is None else _cause(cause)]
        if self._group is not None:  # what only the first does can fail too
            distributed.broadcast_object_list(message, src=0, group=self._group)
        if message[0] is not None:
            last = latest_checkpoint(self._folder)
            kept = f"the last complete one is {last}" if last else "there is no earlier one"
            raise RunFailed(
                f"checkpoint {target} could not be written: {message[0]}; {kept}; free disk space and repeat the command to go on"
            ) from cause
        if _first():
            for old in _checkpoints(self._folder)[: -self._keep]:
                shutil.rmtree(old)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores model, optimizer, equaliser and random state in place.

    Raises:
        UserError: the checkpoint cannot be read or belongs to another model.
    """
    state = _state(model, optimizer, Progress())
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state["equalizer"] = _empty_like(saved, "equalizer.")
        if f"{_rng_key()}.cpu" not in saved:
            del state[_rng_key()]  # saved by fewer processes
        with _single_process_is_fine():
            dcp.load(state, checkpoint_id=path, no_dist=not distributed.is_initialized())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        load_equalizer_state_dict(model, state["equalizer"])
    except (OSError, CheckpointException, RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} cannot be loaded: {_cause(error)}; delete it to go on from the one before, or start again "
            "with run.overwrite=true"
        ) from error
    if rng := state.get(_rng_key()):
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    return Progress(state["step"], state["batches"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Restores the weights of an unsharded model alone, in place, whatever number of processes saved them.

    Raises:
        UserError: the checkpoint cannot be read or belongs to another model.
    """
    state = {"model": model.state_dict()}
    try:
        with _single_process_is_fine():
            dcp.load(state, checkpoint_id=path, no_dist=True)
        model.load_state_dict(state["model"])
    except (OSError, CheckpointException, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be loaded: {_cause(error)}") from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "equalizer": equalizer_state_dict(model),
        _rng_key(): rng,
        "step": progress.step,
        "batches": progress.batches,
    }


def _copied(value: Any) -> Any:
    """A copy of a state on the CPU. PyTorch's DefaultStager fails in torch 2.11 (KeyError: <class 'type'>)."""
    if is_traceable_wrapper_subclass(value):  # DTensors, moments in 8 bits: these have no clone
        names, context = value.__tensor_flatten__()
        parts = {name: _copied(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _rng_key() -> str:
    """Each process has random numbers of its own; all other parts of the state are those of the run."""
    return "rng" if _first() else f"rng{distributed.get_rank()}"


def _first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _empty_like(saved: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    # Which layers have an equaliser is known to the checkpoint only: a fresh model has seen no batch.
    return {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without the warning that there is no process group, which a run on one device needs none of."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        inner, _ = next(iter(error.failures.values()))
        return str(inner)
    return str(error)
