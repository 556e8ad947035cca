"""The loss of `halo-train run` on 1, 2, 3 and 4 processes, from the same weights: they differ by rounding and by the order of sums.

    python benchmarks/run_curves.py                                              # 4 GPUs, 100 steps, about 80 s
    python benchmarks/run_curves.py --device cpu --processes 1 2 --steps 12      # shows that it runs
    python benchmarks/run_curves.py --recipe fp8_plain                           # what is left without equalisation

With equalisation they differ by its factors too: each process brings a micro-batch of its own to those that they are taken from.

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

import torch
from common import RESULTS, ROOT, environment, save_json

from halo_train import RECIPES
from halo_train.training.config import load_config
from halo_train.training.model import build_model, export_model
from halo_train.training.prepare import load_data

RUN = ROOT / "recipes" / "quickstart.yaml"


def start(folder: Path, processes: int, steps: int, device: str, recipe: str) -> subprocess.Popen[bytes]:
    """A run of 12 micro-batches a step, which 1, 2, 3 and 4 processes share evenly."""
    settings = {
        "run.name": f"{processes}-processes",
        "run.dir": folder,
        "model.path": folder / "model",
        "train.device": device,
        "train.steps": steps,
        "quant.recipe": recipe,
        "train.grad_accum": 12,
        "train.micro_batch": 4,
        "save.every": steps,
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    command = ["halo_train.cli", "run", str(RUN), *arguments]
    with (folder / f"{processes}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command, f"--nproc={processes}"],
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


def table(curves: dict[int, dict[str, dict[int, float]]]) -> str:
    """Losses by step, and the largest difference of each run to that of the fewest processes."""
    first, *_ = curves.values()
    steps = sorted(first["loss"])
    shown = [step for step in steps if step in (1, 2, 5, 10) or step % 20 == 0]
    lines = ["training loss at step" + "".join(f"{step:>9}" for step in shown) + "  largest difference"]
    for processes, curve in curves.items():
        differences = max(abs(curve["loss"][step] - first["loss"][step]) for step in steps)
        losses = "".join(f"{curve['loss'][step]:9.4f}" for step in shown)
        lines.append(f"{processes:>11} processes{losses}{differences:12.4f}")
    for processes, curve in curves.items():
        lines.append(
            f"{processes} processes, validation: {', '.join(f'{v:.4f}' for v in curve['valid_loss'].values())}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipe", default="fp8", choices=list(RECIPES))
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        runs = {n: start(folder, n, args.steps, args.device, args.recipe) for n in args.processes}
        codes = {n: run.wait() for n, run in runs.items()}
        if any(codes.values()):
            failed = "\n".join((folder / f"{n}.log").read_text() for n, code in codes.items() if code)
            raise SystemExit(f"exit codes {codes}\n{failed}")
        curves = {n: read(folder / f"{n}-processes") for n in args.processes}
    print(table(curves))
    command = f"python benchmarks/run_curves.py --device {args.device} --processes {' '.join(map(str, args.processes))} --steps {args.steps} --recipe {args.recipe}"
    record = {"environment": environment(args.commit), "command": command, "curves": curves}
    print(save_json("fsdp-curves", record, args.out))


def read(run: Path) -> dict[str, dict[int, float]]:
    """Training and validation loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in ("loss", "valid_loss")}


if __name__ == "__main__":
    main()
