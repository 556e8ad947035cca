"""What every benchmark records about the machine, and where its results go."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halo_train import ops

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def environment(commit: str | None = None) -> dict[str, Any]:
    """GPU, driver, versions and commit, as every result states them.

    Args:
        commit: where the sources are no git checkout (a copy on another machine).
    """
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": ops.kernel_status()["build"],
        "commit": commit or _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown",
    }


def save_json(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``<date>-<name>-<gpu>.json``; other files of the same result share its stem."""
    gpu = record["environment"]["gpu"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['environment']['date']}-{name}-{gpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def check_only(parser: argparse.ArgumentParser, only: Sequence[str] | None, names: Sequence[str]) -> None:
    """Ends the program if ``--only`` names something that is not there, or leaves out bf16, which all are compared with."""
    unknown = [name for name in only or () if name not in names]
    if unknown:
        parser.error(
            f"--only must name some of {', '.join(map(repr, names))}; got {', '.join(map(repr, unknown))}"
        )
    if only and "bf16" not in only:
        parser.error(f"--only must have 'bf16' among its names; got {', '.join(map(repr, only))}")


def _output(*command: str) -> str:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""
