"""The loss of `halo-train run` on 1, 2, 3 and 4 processes, from the same weights, beside what the order of sums alone does to it.

    python benchmarks/run_curves.py                                              # 4 GPUs, 100 steps, about 90 s
    python benchmarks/run_curves.py --device cpu --processes 1 2 --orders 1 --steps 12   # shows that it runs

Each step has the same 12 micro-batches however many processes share them. What differs is the order in which losses and gradients are
summed; and one process alone rounds W once more for dgrad, where several fold it (docs/fsdp.md). So all runs are compared with one
process that folds, and the control is the same process with the micro-batches of each step in other orders: the same rows, the same
micro-batches, the same arithmetic but for the order of sums.

All runs start at once and share the GPUs. The model is recipes/quickstart.yaml's, written to a directory first: of random weights one
process would draw others on a GPU than several. Writes a dated JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, ROOT, environment, save_json
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from halo_train import RECIPES, cli
from halo_train.recipe_file import save_recipe
from halo_train.recipes import finetune
from halo_train.training.checkpoint import latest_checkpoint
from halo_train.training.config import load_config
from halo_train.training.data import Batch, BatchStream
from halo_train.training.model import build_model, export_model
from halo_train.training.prepare import load_data

RUN = ROOT / "recipes" / "quickstart.yaml"

MICRO_BATCHES = 12
"""Of a step; 1, 2, 3 and 4 processes share them evenly."""

Curve = dict[str, dict[int, float]]
"""Training and validation loss by step."""


def run_in_order(seed: int) -> None:
    """The command line with the micro-batches of every step in the order that the seed gives."""
    generator = torch.Generator().manual_seed(seed)
    step: list[Batch] = []

    class OtherOrder(BatchStream):
        def __next__(self) -> Batch:
            if not step:
                batches = [BatchStream.__next__(self) for _ in range(MICRO_BATCHES)]
                order = torch.randperm(MICRO_BATCHES, generator=generator).tolist()
                step.extend(batches[i] for i in order)
            return step.pop()

    with patch.object(finetune, "BatchStream", OtherOrder):
        cli.main()


def start(
    folder: Path, name: str, settings: dict[str, Any], processes: int, order: int | None, gpu: str | None
) -> subprocess.Popen[bytes]:
    """A run in the background; gpu: the one that it sees, or None for all."""
    settings = {"run.name": name, "run.dir": folder, "model.path": folder / "model", **settings}
    code = (
        ["-m", "halo_train.cli"]
        if order is None
        else ["-c", f"import run_curves; run_curves.run_in_order({order})"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{Path(__file__).parent}:{environment.get('PYTHONPATH', '')}"
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [*code, "run", str(RUN), *(f"{key}={value}" for key, value in settings.items())]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command, *([f"--nproc={processes}"] if processes > 1 else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def write_model(folder: Path) -> None:
    """The run's model with random weights and its tokenizer, as a Hugging Face directory."""
    config = load_config(RUN, [])
    tokenizer = load_data(config, folder).tokenizer
    model = build_model(Path(config.model.path), tokenizer, 0, config.data.seq_len, torch.float32)
    export_model(model, tokenizer, folder / "model")


def differences(a: Curve, b: Curve) -> list[float]:
    """Of the training losses, by step."""
    return [abs(loss - b["loss"][step]) for step, loss in a["loss"].items()]


def table(curves: dict[str, Curve], reference: str) -> str:
    """Losses by step, and the largest and the median difference of each run to the reference."""
    steps = sorted(curves[reference]["loss"])
    shown = [step for step in steps if step in (1, 2, 5, 10) or step % 25 == 0]
    width = max(map(len, curves))
    lines = [" " * width + "".join(f"{step:>9}" for step in shown) + "    valid  largest   median difference"]
    for name, curve in curves.items():
        far = differences(curve, curves[reference])
        losses = "".join(f"{curve['loss'][step]:9.4f}" for step in shown)
        *_, valid = curve["valid_loss"].values()
        lines.append(f"{name:>{width}}{losses}{valid:9.4f}{max(far):9.5f}{statistics.median(far):9.5f}")
    return "\n".join(lines)


def verdict(curves: dict[str, Curve], what: str, runs: list[str], same: list[str]) -> str:
    """Whether runs are as near to the first of ``same`` as runs that differ in the order of sums alone are to each other."""
    found = [differences(curves[name], curves[same[0]]) for name in runs]
    orders = [differences(curves[a], curves[b]) for a, b in combinations(same, 2)]
    most, control = (max(map(max, each)) for each in (found, orders))
    medians = [statistics.median(map(statistics.median, each)) for each in (found, orders)]
    return (
        f"{what}: at most {most:.5f}, median {medians[0]:.5f}; orders of sums: at most {control:.5f}, median {medians[1]:.5f}: "
        f"{'within' if most <= control else 'not within'} them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--orders", type=int, default=4, help="runs of the control")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recipe", default="fp8", choices=list(RECIPES))
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    gpus = [str(gpu) for gpu in range(torch.cuda.device_count())] if args.device == "cuda" else []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        save_recipe(folder / "folded.json", {"*": RECIPES[args.recipe].with_folded_dgrad}, {})
        settings = {
            "train.device": args.device,
            "train.steps": args.steps,
            "train.grad_accum": MICRO_BATCHES,
            "train.micro_batch": 4,
            "save.every": args.steps,
        }
        as_is, folded = (
            {"quant.recipe": recipe} | settings for recipe in (args.recipe, folder / "folded.json")
        )
        several = {f"{n}-processes": n for n in args.processes if n > 1}
        same = ["1-process-folded", *(f"the-same-in-order-{i + 1}" for i in range(args.orders))]
        runs = {name: start(folder, name, as_is, n, None, None) for name, n in several.items()}
        alone = [(same[0], folded, None), ("1-process", as_is, None)]
        alone += [(name, folded, i) for i, name in enumerate(same[1:])]
        for i, (name, chosen, order) in enumerate(alone):
            # The last GPUs have the fewest ranks of the others.
            gpu = gpus[-1 - (0, 1, 0, 2, 1, 0)[i % 6] % len(gpus)] if gpus else None
            runs[name] = start(folder, name, chosen, 1, order, gpu)
        codes = {name: run.wait() for name, run in runs.items()}
        if any(codes.values()):
            failed = "\n".join((folder / f"{name}.log").read_text() for name, code in codes.items() if code)
            raise SystemExit(f"exit codes {codes}\n{failed}")
        names = [*same, "1-process", *several]
        curves = {name: read(folder / name) for name in names}
        exponents = {name: factors(folder / name) for name in names}
    print(table(curves, same[0]))
    other = {name: int((found != exponents[same[0]]).sum()) for name, found in exponents.items()}
    print(f"equalisation factors that differ, of {exponents[same[0]].numel()}: {max(other.values())}")
    print(verdict(curves, "several processes", list(several), same))
    print(verdict(curves, "one that does not fold", ["1-process"], same))
    command = (
        f"python benchmarks/run_curves.py --device {args.device} --processes {' '.join(map(str, args.processes))} "
        f"--orders {args.orders} --steps {args.steps} --recipe {args.recipe}"
    )
    record = {
        "environment": environment(args.commit),
        "command": command,
        "curves": curves,
        "other_factors": other,
    }
    print(save_json("fsdp-curves", record, args.out))


def read(run: Path) -> Curve:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in ("loss", "valid_loss")}


def factors(run: Path) -> torch.Tensor:
    """log2 d of all layers, from the last checkpoint."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group, and none is needed
        dcp_to_torch_save(path, run / "state.pt")
    state = torch.load(run / "state.pt", weights_only=False)["equalizer"]
    return torch.cat([state[name] for name in sorted(state)]) if state else torch.empty(0)


if __name__ == "__main__":
    main()
