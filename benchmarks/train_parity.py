"""What low precision costs in loss: every scheme of docs/numerics.md section 6 on a Llama of 100M parameters and real text.

    python benchmarks/train_parity.py                   # about 5 minutes on 4 H200s, 20 on one
    python benchmarks/train_parity.py --seconds 180     # as much as fits, what matters most first; again: goes on where it was
    python benchmarks/train_parity.py --schemes int8 --seeds 2 --out part    # some runs; parity_table.py puts parts together
    python benchmarks/train_parity.py --smoke           # seconds on a CPU: shows that it runs, not what low precision costs

A byte-level Llama is trained from scratch in bf16 on the Python sources of this machine's standard library and packages.
Then outliers are planted without changing the function: c times six channels of every norm gain and of every up
projection, 1/c times the columns that read them. Every scheme fine-tunes these weights for some steps; a seed fixes the order
of the data, the same for all schemes. The figure is the gap of the validation loss to bf16 of the same seed; the spread of
bf16 over its seeds is what it has to be read against.

float32 weights, AdamW, bfloat16 autocast, as recipes/finetune.py trains; on a GPU a step is one CUDA graph. Writes JSON after
every run, in the end a table and a picture of the curves. Gaps count only between runs from the same weights, so a record
names them by their hash. All algorithms are deterministic: GPUs of one kind pre-train to the same bits, and runs of several
machines add up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from common import RESULTS, environment, save_json
from llama import Llama, Shape
from parity_table import MAIN, SCHEMES, by_scheme, write_report
from torch import Tensor, nn

from halo_train import convert_to_halo_training

OUTLIER_CHANNELS = 6
EVAL_POINTS = 3


@dataclass(frozen=True)
class Size:
    """Of the model and of the runs."""

    hidden: int = 768
    layers: int = 14
    intermediate: int = 2048
    length: int = 1024
    batch: int = 8
    pretrain_steps: int = 2000
    steps: int = 300
    eval_batches: int = 16
    corpus_bytes: int = 150_000_000


SMOKE = Size(64, 2, 128, 64, 2, 4, 4, 1, 200_000)


@dataclass(frozen=True)
class Run:
    """One fine-tuning run."""

    scheme: str
    outlier: int
    seed: int


class Text:
    """Python sources as bytes: a training and a validation part."""

    def __init__(self, size: Size) -> None:
        roots = [Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent]
        # A file may lie under both roots, and once only counts.
        files = sorted({f for root in roots for f in root.rglob("*.py")})
        parts, total = [], 0
        for file in files:
            parts.append(file.read_bytes())
            total += len(parts[-1])
            if total >= size.corpus_bytes:
                break
        data = b"".join(parts)
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        # The last 2% of every 1 MB, so that both parts hold the same kinds of text.
        held_out = torch.arange(len(tokens)) % 1_000_000 >= 980_000 if len(tokens) > 1_000_000 else None
        cut = int(len(tokens) * 0.9)
        self.train = tokens[:cut] if held_out is None else tokens[~held_out]
        self.valid = tokens[cut:] if held_out is None else tokens[held_out]
        self._size = size

    def batch(self, part: Tensor, generator: torch.Generator) -> Tensor:
        """[batch, length + 1] int64 of random places."""
        length = self._size.length + 1
        starts = torch.randint(len(part) - length, (self._size.batch, 1), generator=generator)
        return part[starts + torch.arange(length)].long()


def build(size: Size, device: str) -> Llama:
    heads = max(1, size.hidden // 64)
    torch.manual_seed(0)
    model = Llama(Shape(size.layers, size.hidden, heads, heads, size.intermediate, 256, size.length))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    # The cache of autocast does not know that a captured step runs again with other weights.
    with torch.autocast(tokens.device.type, torch.bfloat16, cache_enabled=False):
        return model(tokens)


@torch.no_grad()
def validate(model: nn.Module, text: Text, size: Size, device: str) -> float:
    generator = torch.Generator().manual_seed(1234)
    model.eval()
    batches = (text.batch(text.valid, generator).to(device) for _ in range(size.eval_batches))
    found = statistics.fmean(loss_of(model, tokens).item() for tokens in batches)
    model.train()
    return found


class Step:
    """One step of AdamW on a batch, clipped to a gradient norm of 1; from the fourth on a GPU replays a CUDA graph."""

    def __init__(self, model: nn.Module, rate: float, batch: Tensor) -> None:
        self._cuda = batch.is_cuda
        self._model, self._tokens, self._graph, self._eager_steps = model, batch, None, 0
        self._rate = torch.tensor(rate, device=batch.device)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self._rate if self._cuda else rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=self._cuda,
            capturable=self._cuda,
        )
        self._stream = torch.cuda.Stream() if self._cuda else None

    def __call__(self, tokens: Tensor, rate: float) -> None:
        self._tokens.copy_(tokens)
        if not self._cuda:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._run()
            return
        self._rate.fill_(rate)
        if self._graph is None and self._eager_steps < 3:
            self._eager_steps += 1
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()
        self._graph.replay()

    def _run(self) -> None:
        self._optimizer.zero_grad()
        loss_of(self._model, self._tokens).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def optimise(
    model: nn.Module, text: Text, size: Size, device: str, *, steps: int, rate: float, seed: int, cosine: bool
) -> list[tuple[int, float]]:
    """Trains; returns (step, validation loss) at EVAL_POINTS steps, the last included."""
    generator, curve = torch.Generator().manual_seed(seed), []
    warm_up = max(1, steps // 20)
    run = Step(model, rate, torch.zeros(size.batch, size.length + 1, dtype=torch.long, device=device))
    for step in range(1, steps + 1):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0
        run(text.batch(text.train, generator), rate * min(1.0, step / warm_up) * max(decay, 0.1))
        if step % max(1, steps // EVAL_POINTS) == 0 or step == steps:
            curve.append((step, validate(model, text, size, device)))
    return curve


@torch.no_grad()
def plant_outliers(model: Llama, c: int) -> None:
    """Multiplies some channels by c and what reads them by 1/c: the function stays, its activations grow outliers."""
    generator = torch.Generator().manual_seed(99)

    def channels(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)[:OUTLIER_CHANNELS]

    for block in model.blocks:
        readers = [
            (block.norm1.weight, [block.q, block.k, block.v]),
            (block.norm2.weight, [block.gate, block.up]),
            (block.up.weight, [block.down]),
        ]
        for written, reading in readers:
            chosen = channels(written.shape[0])
            written[chosen] *= c
            for linear in reading:
                linear.weight[:, chosen] /= c


def fine_tune(run: Run, state: dict[str, Tensor], text: Text, size: Size, device: str) -> dict[str, Any]:
    model = build(size, device)
    model.load_state_dict(state)
    plant_outliers(model, run.outlier)
    started = time.perf_counter()
    if run.scheme != "bf16":
        convert_to_halo_training(model, recipe=SCHEMES[run.scheme])  # the output layer stays in bf16
    curve = optimise(
        model, text, size, device, steps=size.steps, rate=1e-4, seed=1000 + run.seed, cosine=False
    )
    return {
        "scheme": run.scheme,
        "outlier": run.outlier,
        "seed": run.seed,
        "curve": curve,
        "loss": curve[-1][1],
        "seconds": time.perf_counter() - started,
    }


def be_deterministic() -> None:
    """Every later operation of this process gives the same bits for the same input."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def work(device: str, size: Size, weights: Path, deadline: float, todo: Any, done: Any) -> None:
    """One process: takes runs from a queue until None comes; answers None to those that would not end by the deadline."""
    be_deterministic()
    if device != "cpu":
        torch.cuda.set_device(device)
    text, slowest = Text(size), 0.0
    while (run := todo.get()) is not None:
        if time.time() + slowest > deadline:
            done.put(None)
            continue
        started = time.time()
        done.put(fine_tune(run, torch.load(weights)["state"], text, size, device))
        slowest = max(slowest, time.time() - started)


class Workers:
    """Processes that fine-tune, several on a GPU; they read the text while the model is still being pre-trained.

    Args:
        weights: file that is there when the first run is asked for.
    """

    def __init__(self, size: Size, weights: Path, devices: list[str], deadline: float) -> None:
        context = mp.get_context("spawn")
        self._todo, self._done = context.Queue(), context.Queue()
        arguments = [(device, size, weights, deadline, self._todo, self._done) for device in devices]
        self._processes = [context.Process(target=work, args=each, daemon=True) for each in arguments]
        for process in self._processes:
            process.start()

    def results(self, runs: list[Run]) -> Iterator[dict[str, Any]]:
        """Of the runs that ended in time, as they come."""
        for run in [*runs, *(None for _ in self._processes)]:
            self._todo.put(run)
        missing = 0
        for _ in runs:
            while self._done.empty():
                if any(process.exitcode for process in self._processes):
                    raise SystemExit("a worker failed; its traceback is above")
                time.sleep(0.05)
            result = self._done.get()
            if result is None:
                missing += 1
            else:
                yield result
        if missing:
            print(f"{missing} of {len(runs)} runs were not started: --seconds is over")


def pretrained(size: Size, text: Text, device: str, weights: Path) -> dict[str, Any]:
    """What is in the file of weights: state, its hash, the curve of its validation loss, size and text; pre-trains if that is
    not there yet."""
    origin = {"size": vars(size), "text": text.digest}
    if weights.exists():
        found = torch.load(weights)
        if origin.items() <= found.items():
            return found
    model = build(size, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters; {len(text.train) / 1e6:.1f} MB of text, sha256 {text.digest}")
    started = time.perf_counter()
    curve = optimise(model, text, size, device, steps=size.pretrain_steps, rate=6e-4, seed=0, cosine=True)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()[:16]
    seconds = time.perf_counter() - started
    print(f"pre-training: {seconds:.0f} s, validation loss by step {curve}, sha256 {digest}", flush=True)
    found = {**origin, "parameters": parameters, "curve": curve, "sha256_16": digest, "state": state}
    torch.save(found, weights)
    return found


def recorded(start: dict[str, Any], text: Text, folder: Path, commit: str | None) -> dict[str, Any]:
    """The record in ``folder`` of runs from these pre-trained weights, or an empty one."""
    for path in sorted(folder.glob("*-train-parity-*.json"), reverse=True):
        record = json.loads(path.read_text())
        if record.get("weights_sha256_16") == start["sha256_16"]:
            print(f"{len(record['runs'])} runs are in {path}")
            return record
    return {
        "environment": environment(commit),
        "command": " ".join(sys.argv),
        "parameters": start["parameters"],
        "text": {"sha256_16": text.digest, "bytes": len(text.train) + len(text.valid)},
        "size": start["size"],
        "pretraining": start["curve"],
        "weights_sha256_16": start["sha256_16"],
        "runs": [],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outliers", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of bf16, fp8, int8; the others run with the first",
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--pretrain-steps", type=int, default=Size.pretrain_steps)
    parser.add_argument("--per-gpu", type=int, default=2, help="processes that share a GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed, on the CPU")
    args = parser.parse_args(argv)
    size = SMOKE if args.smoke else Size(pretrain_steps=args.pretrain_steps)
    seeds = args.seeds[:1] if args.smoke else args.seeds
    if not (args.smoke or torch.cuda.is_available()):
        parser.error("needs a CUDA GPU; --smoke runs on a CPU")
    count = 0 if args.smoke else torch.cuda.device_count()
    device = "cuda:0" if count else "cpu"
    deadline = time.time() + args.seconds
    be_deterministic()

    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "train-parity-pretrained.pt"
    devices = [f"cuda:{i}" for i in range(count)] * args.per_gpu
    workers = Workers(size, weights, devices, deadline) if count else None
    text = Text(size)
    start = pretrained(size, text, device, weights)
    record = recorded(start, text, args.out, args.commit)
    # What matters most comes first, in case the time is short.
    schemes = args.schemes
    runs = [
        Run(scheme, c, seed)
        for chosen, wanted in ((MAIN, seeds), ([s for s in schemes if s not in MAIN], seeds[:1]))
        for seed in wanted
        for scheme in chosen
        if scheme in schemes
        for c in args.outliers
    ]
    known = {(r["scheme"], r["outlier"], r["seed"]) for r in record["runs"]}
    runs = [run for run in runs if (run.scheme, run.outlier, run.seed) not in known]
    if workers:
        found = workers.results(runs)
    else:
        found = (fine_tune(run, start["state"], text, size, device) for run in runs)
    results, commit = record["runs"], environment(args.commit)["commit"]
    path = save_json("train-parity", record, args.out)
    for i, r in enumerate(found, 1):
        results.append({**r, "commit": commit})
        results.sort(key=by_scheme)
        save_json("train-parity", record, args.out)
        print(
            f"{i:3} of {len(runs)}  c={r['outlier']:<4} seed {r['seed']}  {r['loss']:.4f}  {r['seconds']:4.0f} s  {r['scheme']}",
            flush=True,
        )
    print("\n" + write_report(record, path) + f"\n{path}")


if __name__ == "__main__":
    main()
