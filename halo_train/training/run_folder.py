"""The folder of a run: when it may be used, and what tells that a run is there."""

from __future__ import annotations

import shutil
from pathlib import Path

from .checkpoint import latest_checkpoint
from .config import Config, first_difference, load_config
from .errors import UserError
from .logging import read_metrics, unfinished_name, write_atomically


def check_run_folder(config: Config) -> Path:
    """The folder of the run, after making sure that nothing there gets lost. Nothing is written or deleted yet.

    Raises:
        UserError: the folder holds something else than a run; or a run that has other settings or must not be resumed, and
            run.overwrite is not set.
    """
    folder = config.run.dir / config.run.name
    saved = folder / "config.yaml"
    unfinished = unfinished_name(saved)  # all there is of a run that was killed while it wrote its first file
    if not folder.exists() or (folder.is_dir() and all(path == unfinished for path in folder.iterdir())):
        return folder
    if not saved.is_file():
        raise UserError(
            f"{folder} exists and is no run of halo_train; choose another run.name or remove it yourself"
        )
    started = (
        bool(read_metrics(folder / "metrics.jsonl")) or latest_checkpoint(folder / "checkpoints") is not None
    )
    if not started or config.run.overwrite:
        return folder
    if config.run.resume == "never":
        raise UserError(
            f"run directory {folder} exists; go on with run.resume=auto, delete it and start again with "
            "run.overwrite=true, or choose another run.name"
        )
    difference = first_difference(load_config(saved), config)
    if difference is not None:
        raise UserError(
            f"{folder} holds a run that was started with other settings: {difference}; use the same value to go on with it, "
            "another run.name for a new run, or run.overwrite=true to delete it"
        )
    return folder


def make_run_folder(folder: Path, config: Config) -> None:
    """Makes the folder, first of all with config.yaml, by which it is known; with run.overwrite it is emptied before."""
    if folder.exists() and config.run.overwrite:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", config.to_yaml())
    (folder / "checkpoints").mkdir(exist_ok=True)
