"""The loss of `halo-train run` on 1, 2, 3 and 4 processes, from the same weights: they differ by rounding and by the order of sums.

How far apart that alone takes two runs shows one more: of the fewest processes, with micro-batches of half the size.

    python benchmarks/run_curves.py                                              # 4 GPUs, 100 steps, about 80 s
    python benchmarks/run_curves.py --device cpu --processes 1 2 --steps 12      # shows that it runs

All runs start at once and share the GPUs. The model is recipes/quickstart.yaml's, written to a directory first: of random weights one
process would draw others on a GPU than several. Writes a dated JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, ROOT, environment, save_json

from halo_train.training.config import load_config
from halo_train.training.model import build_model, export_model
from halo_train.training.prepare import load_data

RUN = ROOT / "recipes" / "quickstart.yaml"


MICRO_BATCH, BATCH = 4, 48


class Curve(NamedTuple):
    """One run of 48 sequences a step, which 1, 2, 3 and 4 processes share evenly."""

    processes: int
    micro_batch: int

    @property
    def name(self) -> str:
        return f"{self.processes} processes" + (
            "" if self.micro_batch == MICRO_BATCH else f", micro-batches of {self.micro_batch}"
        )


def start(folder: Path, run: Curve, steps: int, device: str) -> subprocess.Popen[bytes]:
    settings = {
        "run.name": run.name,
        "run.dir": folder,
        "model.path": folder / "model",
        "train.device": device,
        "train.steps": steps,
        "train.grad_accum": BATCH // run.micro_batch,
        "train.micro_batch": run.micro_batch,
        "save.every": steps,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    command = ["halo_train.cli", "run", str(RUN), *arguments]
    with (folder / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, f"--nproc={run.processes}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def write_model(folder: Path) -> None:
    """The run's model with random weights and its tokenizer, as a Hugging Face directory."""
    config = load_config(RUN, [])
    tokenizer = load_data(config, folder).tokenizer
    model = build_model(Path(config.model.path), tokenizer, 0, config.data.seq_len, torch.float32)
    export_model(model, tokenizer, folder / "model")


def table(curves: dict[str, dict[str, dict[int, float]]]) -> str:
    """Losses by step, and the largest difference of each run to the first."""
    first, *_ = curves.values()
    steps = sorted(first["loss"])
    shown = [step for step in steps if step in (1, 2, 5, 10) or step % 20 == 0]
    width = max(len("training loss at step"), *map(len, curves))
    lines = [
        "training loss at step".rjust(width)
        + "".join(f"{step:>9}" for step in shown)
        + "  largest difference"
    ]
    for name, curve in curves.items():
        differences = max(abs(curve["loss"][step] - first["loss"][step]) for step in steps)
        losses = "".join(f"{curve['loss'][step]:9.4f}" for step in shown)
        lines.append(f"{name:>{width}}{losses}{differences:12.4f}")
    for name, curve in curves.items():
        lines.append(f"{name}, validation: {', '.join(f'{v:.4f}' for v in curve['valid_loss'].values())}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        wanted = [Curve(n, MICRO_BATCH) for n in args.processes]
        wanted.append(Curve(min(args.processes), MICRO_BATCH // 2))
        runs = {run.name: start(folder, run, args.steps, args.device) for run in wanted}
        codes = {name: run.wait() for name, run in runs.items()}
        if any(codes.values()):
            failed = "\n".join((folder / f"{name}.log").read_text() for name, code in codes.items() if code)
            raise SystemExit(f"exit codes {codes}\n{failed}")
        curves = {name: read(folder / name) for name in runs}
    print(table(curves))
    command = f"python benchmarks/run_curves.py --device {args.device} --processes {' '.join(map(str, args.processes))} --steps {args.steps}"
    record = {"environment": environment(args.commit), "command": command, "curves": curves}
    print(save_json("fsdp-curves", record, args.out))


def read(run: Path) -> dict[str, dict[int, float]]:
    """Training and validation loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in ("loss", "valid_loss")}


if __name__ == "__main__":
    main()
