"""Checkpoints that a kill or a full disk cannot spoil, and that a run continues from bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

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


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    """Saves everything that the next step depends on to ``folder/step-N`` and deletes all but the newest ``keep``.

    The files are written to a temporary folder, flushed to the disk and renamed, so every ``step-N`` is complete. Every process
    of a run calls this; each writes its shards, and any number of processes can go on from them.

    Raises:
        RunFailed: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{progress.step}"
    if target.exists():
        return target  # a resumed run that was stopped before its next step
    temporary = folder / f".unfinished-{target.name}"
    try:
        if _first():
            for leftover in folder.glob(".unfinished-*"):
                shutil.rmtree(leftover)
        _wait()
        with _single_process_is_fine():
            dcp.save(
                _state(model, optimizer, progress),
                checkpoint_id=temporary,
                no_dist=not distributed.is_initialized(),
            )
        if _first():
            os.rename(temporary, target)
            _flush_folder(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest_checkpoint(folder)
        kept = f"the last complete one is {last}" if last else "there is no earlier one"
        raise RunFailed(
            f"checkpoint {target} could not be written: {_cause(error)}; {kept}; free disk space and "
            "repeat the command to go on"
        ) from error
    if _first():
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    _wait()
    return target


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


def _rng_key() -> str:
    """Each process has random numbers of its own; all other parts of the state are those of the run."""
    return "rng" if _first() else f"rng{distributed.get_rank()}"


def _first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _wait() -> None:
    if distributed.is_initialized():
        distributed.barrier()


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
