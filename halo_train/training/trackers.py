"""Weights & Biases and TensorBoard, each where it is asked for."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlparse

from halo_train.metrics.collect import Sink
from halo_train.metrics.tensorboard_sink import TensorBoardSink
from halo_train.metrics.wandb_sink import WandbSink

from .config import LogSection
from .errors import UserError


class Trackers:
    """Sends every step's numbers to what ``log`` asks for.

    Weights & Biases is offline where no key is set, unless WANDB_MODE says otherwise. TensorBoard's files are in
    ``folder/tensorboard``.

    Args:
        name: of the run there; config: shown with it.
        done: steps before a resume; TensorBoard drops what it has of later ones.

    Raises:
        UserError: one of them is asked for, but not installed.
    """

    def __init__(self, log: LogSection, folder: Path, name: str, config: dict[str, Any], done: int) -> None:
        self._wandb = _wandb_run(folder, name, config) if log.wandb else None
        self._tensorboard = _summary_writer(folder, done) if log.tensorboard else None

    def log(self, step: int, **values: float) -> None:
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)

    def quant_sinks(self) -> list[Sink]:
        """For QuantMetrics."""
        sinks: list[Sink] = [] if self._wandb is None else [WandbSink(self._wandb)]
        if self._tensorboard is not None:
            sinks.append(TensorBoardSink(self._tensorboard))
        return sinks

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)
        if self._tensorboard is not None:
            self._tensorboard.close()


def _wandb_run(folder: Path, name: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError("log.wandb=true needs Weights & Biases: pip install 'halo_train[wandb]'") from None
    if not _has_wandb_key():
        # wandb would stop and ask for a key, which hangs a batch job.
        os.environ.setdefault("WANDB_MODE", "offline")
    return wandb.init(
        project="halo_train", name=name, dir=str(folder), config=config, id=name, resume="allow"
    )


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UserError(
            "log.tensorboard=true needs TensorBoard: pip install 'halo_train[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)


def _has_wandb_key() -> bool:
    """In the environment or where ``wandb login`` leaves it."""
    if "WANDB_API_KEY" in os.environ:
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
