"""The same run with several values of its fields: each a run of its own, one folder, one table, one picture.

Of the fields that have several values one is *compared*, such as ``quant.recipe``; the others, such as ``run.seed``, are
*conditions*. A gap is the difference from the first value of the compared field under the same conditions, so noise that a
seed brings to all precisions cancels.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import RECIPE_FILE, Config, first_difference, is_list, load_config
from .distributed import require_several_possible
from .errors import Interrupted, UserError
from .logging import write_atomically
from .loop import StopSignals

PLAN = "compare.json"
"""File by which a folder is known as that of a comparison; holds the plan, and at the end the results."""

_SEED = "run.seed"


@dataclass(frozen=True)
class Member:
    """One run of a comparison."""

    name: str
    """Of its folder under that of the comparison, e.g. ``fp8+seed=1``."""
    value: str
    """Of the compared field."""
    condition: str
    """Values of the other fields, e.g. ``seed=1``; empty without any."""
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run.dir / self.name

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run wrote; None before."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class Comparison:
    """The runs in the order in which they start: under each condition all values of the compared field."""

    folder: Path
    compared: str
    """Its field, e.g. ``quant.recipe``."""
    members: list[Member]
    overwrite: bool
    """Delete what an earlier comparison left."""

    def reference(self, member: Member) -> Member:
        """What the member's gap is measured from: the first value under the same condition."""
        return next(other for other in self.members if other.condition == member.condition)


def plan(file: Path, overrides: Sequence[str], steps: int | None) -> Comparison:
    """Checks everything that can be checked before the first run starts; writes nothing.

    Args:
        file: run file.
        overrides: ``section.key=value``; a value with commas is a list of values, but for fields that hold lists themselves.
        steps: optimiser steps, in place of what the file says.

    Raises:
        UserError: no field with several values, a value twice, a run file that is not valid with one of them, or a folder
            that holds something else.
    """
    length = [] if steps is None else [f"train.steps={steps}", "train.epochs=null"]
    fixed, varied = list(length), {}
    for override in overrides:
        key, _, value = override.partition("=")
        if "," in value and not is_list(key):
            varied[key] = value.split(",")
        else:
            fixed.append(override)
    if not varied:
        raise UserError(
            "compare needs a field with several values, separated by commas, e.g. quant.recipe=bf16,fp8,int8; got "
            f"{' '.join(overrides) or 'none'}"
        )
    for key, values in varied.items():
        if len({_label(key, value) for value in values}) < len(values):
            raise UserError(f"{key}={','.join(values)}: two values have the same name; give each once")
    compared = next((key for key in varied if key != _SEED), _SEED)
    conditions = {key: values for key, values in varied.items() if key != compared}

    base = load_config(file, [*fixed, *(f"{key}={values[0]}" for key, values in varied.items())]).run
    folder = base.dir / f"{base.name}-compare"
    members = []
    for chosen in itertools.product(*conditions.values()):
        given = dict(zip(conditions, chosen, strict=True))
        condition = "+".join(_label(key, value) for key, value in given.items())
        for value in varied[compared]:
            label = _label(compared, value)
            name = "+".join(filter(None, (label, condition)))
            config = load_config(
                file,
                [
                    *fixed,
                    *(f"{key}={value}" for key, value in {compared: value, **given}.items()),
                    f"run.name={name}",
                    f"run.dir={folder}",
                    "run.resume=auto",
                    "run.overwrite=false",
                ],
            )
            members.append(Member(name, label, condition, config))
    comparison = Comparison(folder, compared, members, base.overwrite)
    _check_folder(comparison, base.resume == "auto")
    return comparison


def run_members(comparison: Comparison, nproc: int = 1) -> dict[str, int]:
    """Runs what is not finished yet, one after the other, each in a process of its own.

    A process of its own gives each run the whole GPU and a peak memory that is its own, and keeps the others from a crash.

    Args:
        nproc: processes of each run.

    Returns:
        Exit codes of the runs that failed, by name.

    Raises:
        UserError: settings that so many processes cannot have.
        Interrupted: SIGINT or SIGTERM, after the run in progress has saved its checkpoint.
    """
    for member in comparison.members:
        require_several_possible(member.config, nproc)
    folder = comparison.folder
    if comparison.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PLAN, json.dumps(_planned(comparison), indent=2) + "\n")
    failed = {}
    with StopSignals() as stop:
        for number, member in enumerate(comparison.members, start=1):
            title = f"[{number}/{len(comparison.members)}] {member.name}"
            if member.summary is not None:
                print(f"{title}: finished before, in {member.folder}", flush=True)
                continue
            print(f"\n{title}: {member.folder}", flush=True)
            file = folder / f"{member.name}.yaml"
            write_atomically(file, member.config.to_yaml())
            code = _run(file, nproc, stop)
            if stop.received is not None:
                raise Interrupted(
                    stop.received, f"stopped in {member.name}; repeat the command to go on ({folder})"
                )
            if code:
                failed[member.name] = code
                print(f"{title}: failed with exit code {code}; the comparison goes on", flush=True)
    return failed


def _run(file: Path, nproc: int, stop: StopSignals) -> int:
    """Exit code of ``halo-train run FILE``. It is told of a signal once, by us, not by the terminal as well."""
    command = [sys.executable, "-m", "halo_train.cli", "run", str(file), f"--nproc={nproc}"]
    process = subprocess.Popen(command, start_new_session=True)
    told = False
    try:
        while True:
            try:
                return process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if stop.received is not None and not told:
                    process.send_signal(stop.received)
                    told = True
    finally:
        process.kill()  # a second signal came; nothing happens to a process that has ended


def _check_folder(comparison: Comparison, resume: bool) -> None:
    folder = comparison.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / PLAN).is_file():
        raise UserError(
            f"{folder} exists and is no comparison of halo_train; choose another run.name or remove it yourself"
        )
    if not (resume or comparison.overwrite):
        raise UserError(
            f"comparison {folder} exists; finish it or add values to it with run.resume=auto, delete it and start again with "
            "run.overwrite=true, or choose another run.name"
        )
    for member in () if comparison.overwrite else comparison.members:
        saved = member.folder / "config.yaml"
        difference = first_difference(load_config(saved), member.config) if saved.is_file() else None
        if difference is not None:
            raise UserError(
                f"{member.folder} was started with other settings: {difference}; use the same value, or "
                "another run.name for a new comparison"
            )


def _planned(comparison: Comparison) -> dict[str, Any]:
    return {"compared": comparison.compared, "runs": [member.name for member in comparison.members]}


def _label(key: str, value: str) -> str:
    """``fp8`` for a recipe, ``seed=1`` for anything else; fit for the name of a folder."""
    if key == "quant.recipe":
        text = Path(value).stem if value.endswith(RECIPE_FILE) else value
    else:
        text = f"{key.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=-]", "-", text)
