"""What a run writes down on the way: metrics.jsonl, progress, env.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from halo_train.ops import kernel_status

_PACKAGES = ("halo_train", "torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "wandb")


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed line by line, so that a killed run keeps what it had.

    Args:
        path: of the file; lines of a step after ``step`` (and a line cut short by a kill) are removed.
        step: at which the run goes on; 0 starts a new file.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: float) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, without a last line that was cut short; empty when there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = unfinished_name(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def unfinished_name(path: Path) -> Path:
    """Of a file that is being written."""
    return path.with_name(f".{path.name}.tmp")


class ProgressBar:
    """A bar on a terminal; elsewhere a plain line every ``every`` steps, so that log files stay readable.

    Args:
        label: in front of the bar.
        total, start: steps of the run, and those already done.
    """

    def __init__(self, label: str, total: int, start: int, every: int) -> None:
        self.label, self.total, self.every = label, total, every
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True)

    def step(self, step: int, **values: float) -> None:
        numbers = {name: f"{value:.4g}" for name, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update()
        elif step % self.every == 0 or step in (1, self.total):
            self.note(f"step {step}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in numbers.items()))

    def note(self, text: str) -> None:
        """A line of text that leaves the bar whole."""
        if self._bar is not None:
            self._bar.write(f"{self.label}: {text}", file=sys.stderr)
        else:
            print(f"{self.label}: {text}", flush=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def environment() -> dict[str, Any]:
    """Versions, machine, GPU, git commit and the state of the kernels; JSON-ready."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "kernels": kernel_status(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the library's checkout, with ``-dirty`` for local changes; None for an installed package."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
