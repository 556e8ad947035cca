"""What low precision costs in loss: every scheme of docs/numerics.md section 6 on a Llama of 100M parameters and real text.

    python benchmarks/train_parity.py                   # about 5 minutes on 4 H200s, 20 on one
    python benchmarks/train_parity.py --smoke           # seconds on a CPU: shows that it runs, not what low precision costs

A byte-level Llama is trained from scratch in bf16 on the Python sources of this machine's standard library and packages.
Then outliers are planted without changing the function: c times six channels of every norm gain and of every up
projection, 1/c times the columns that read them. Every scheme fine-tunes these weights for some steps; a seed fixes the order
of the data, the same for all schemes. The figure is the gap of the validation loss to bf16 of the same seed; the spread of
bf16 over its seeds is what it has to be read against.

float32 weights, AdamW, bfloat16 autocast, as recipes/finetune.py trains; on a GPU a step is one CUDA graph. Writes JSON, a
table and a picture of the curves.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from common import RESULTS, environment, save_json
from llama import Llama, Shape
from torch import Tensor, nn

from halo_train import RECIPES, HaloConfig, convert_to_halo_training
from halo_train.config import Format, Scaling

_FP8, _INT8 = RECIPES["fp8"], RECIPES["int8"]
SCHEMES: dict[str, HaloConfig] = {
    "bf16": RECIPES["bf16"],
    "fp8": _FP8,
    "int8": _INT8,
    "fp8, folded dgrad": _FP8.with_folded_dgrad,
    "int8, folded dgrad": _INT8.with_folded_dgrad,
    "e4m3 folded (fp8_plain)": RECIPES["fp8_plain"],
    "e4m3 folded, rotated": replace(_FP8.with_folded_dgrad, equalize=False),
    "int8 folded": replace(_INT8.with_folded_dgrad, equalize=False, rotate_k=False),
    "int8 folded, rotated": replace(_INT8.with_folded_dgrad, equalize=False),
    "e4m3 tensorwise, e5m2 gradients": HaloConfig(
        grad_format=Format.E5M2,
        scaling=Scaling.TENSORWISE,
        rotate_k=False,
        requantize_w_dgrad=False,
        equalize=False,
    ),
    "HALO-0 e4m3": RECIPES["halo0_fp8"],
    "HALO-1 e4m3": RECIPES["halo1_fp8"],
    "HALO-0 int8": RECIPES["halo0_int8"],
    "HALO-2 int8": RECIPES["halo2_int8"],
}
MAIN = list(SCHEMES)[:3]
"""Those that run with every seed; the others with the first."""

OUTLIER_CHANNELS = 6
EVAL_POINTS = 6


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


def work(device: str, size: Size, state: dict[str, Tensor], deadline: float, todo: Any, done: Any) -> None:
    """One process: takes runs from a queue until None comes; after the deadline it answers None instead of running them."""
    if device != "cpu":
        torch.cuda.set_device(device)
    text = Text(size)
    while (run := todo.get()) is not None:
        late = time.time() > deadline
        done.put(None if late else fine_tune(run, state, text, size, device))


def in_parallel(
    runs: list[Run], state: dict[str, Tensor], size: Size, devices: list[str], deadline: float
) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for run in [*runs, *(None for _ in devices)]:
        todo.put(run)
    workers = [context.Process(target=work, args=(d, size, state, deadline, todo, done)) for d in devices]
    for worker in workers:
        worker.start()
    answers: list[dict[str, Any] | None] = []
    while len(answers) < len(runs):
        if not done.empty():
            answers.append(done.get())
            if (r := answers[-1]) is not None:
                print(
                    f"{len(answers):3} of {len(runs)}  c={r['outlier']:<4} seed {r['seed']}  {r['loss']:.4f}  "
                    f"{r['seconds']:4.0f} s  {r['scheme']}",
                    flush=True,
                )
        elif any(w.exitcode for w in workers):
            raise SystemExit("a worker failed; its traceback is above")
        else:
            time.sleep(0.05)
    for worker in workers:
        worker.join()
    results = [answer for answer in answers if answer is not None]
    if len(results) < len(runs):
        print(f"{len(runs) - len(results)} of {len(runs)} runs were not started: --seconds is over")
    return results


def gaps(results: list[dict[str, Any]], scheme: str, outlier: int) -> list[float]:
    """Final validation loss over that of bf16 with the same seed."""
    losses = {(r["scheme"], r["seed"]): r["loss"] for r in results if r["outlier"] == outlier}
    pairs = [(loss, losses.get(("bf16", seed))) for (name, seed), loss in losses.items() if name == scheme]
    return [loss - base for loss, base in pairs if base is not None]


def table(results: list[dict[str, Any]], outliers: list[int]) -> str:
    """Markdown: mean gap by scheme and c, with the range over seeds where there are several."""
    lines = [
        "| scheme | " + " | ".join(f"c={c}" for c in outliers) + " |",
        "|---" * (len(outliers) + 1) + "|",
    ]
    for scheme in SCHEMES:
        cells = []
        for c in outliers:
            if scheme == "bf16":
                losses = [r["loss"] for r in results if r["scheme"] == "bf16" and r["outlier"] == c]
                if not losses:
                    cells.append("")
                    continue
                spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
                cells.append(
                    f"loss {statistics.fmean(losses):.4f}, standard deviation over seeds {spread:.4f}"
                )
                continue
            found = gaps(results, scheme, c)
            several = f" ({min(found):+.4f} .. {max(found):+.4f})" if len(found) > 1 else ""
            cells.append(f"{statistics.fmean(found):+.4f}{several}" if found else "")
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], outliers: list[int], path: Path) -> None:
    """Gap to bf16 over the steps, one panel for each c, first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(outliers), figsize=(4.6 * len(outliers), 4), squeeze=False)
    for axis, c in zip(axes[0], outliers, strict=True):
        curves = {r["scheme"]: r["curve"] for r in results if r["outlier"] == c and r["seed"] == 0}
        for scheme, curve in curves.items():
            if scheme != "bf16":
                points = [(s, v - b) for (s, v), (_, b) in zip(curve, curves["bf16"], strict=True)]
                bold = 2.2 if scheme in MAIN else 1.0
                axis.plot(*zip(*points, strict=True), label=scheme, linewidth=bold)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title(f"outliers x {c}", loc="left", fontsize=10)
        axis.set_xlabel("fine-tuning step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("validation loss over bf16")
    axes[0, -1].legend(fontsize=6, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outliers", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--seeds", type=int, default=3, help="of bf16, fp8 and int8")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--per-gpu", type=int, default=2, help="processes that share a GPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is started after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one seed, on the CPU")
    args = parser.parse_args(argv)
    size, seeds = (SMOKE, 1) if args.smoke else (Size(), args.seeds)
    if not (args.smoke or torch.cuda.is_available()):
        parser.error("needs a CUDA GPU; --smoke runs on a CPU")
    count = 0 if args.smoke else torch.cuda.device_count()
    device = "cuda:0" if count else "cpu"
    deadline = time.time() + args.seconds

    text, model = Text(size), build(size, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters; {len(text.train) / 1e6:.1f} MB of text, sha256 {text.digest}")
    started = time.perf_counter()
    curve = optimise(model, text, size, device, steps=size.pretrain_steps, rate=6e-4, seed=0, cosine=True)
    print(f"pre-training: {time.perf_counter() - started:.0f} s, validation loss by step {curve}", flush=True)
    state = {name: value.cpu() for name, value in copy.deepcopy(model.state_dict()).items()}
    del model

    schemes = list(dict.fromkeys(["bf16", *args.schemes]))
    # What matters most comes first, in case the time is short.
    runs = [
        Run(scheme, c, seed)
        for seed in range(seeds)
        for scheme in schemes
        for c in args.outliers
        if seed == 0 or scheme in MAIN
    ]
    devices = [f"cuda:{i}" for i in range(count)] * args.per_gpu or ["cpu"]
    if count:
        results = in_parallel(runs, state, size, devices, deadline)
    else:
        results = [fine_tune(run, state, text, size, device) for run in runs]
    results.sort(key=lambda r: (list(SCHEMES).index(r["scheme"]), r["outlier"], r["seed"]))
    record = {
        "environment": environment(args.commit),
        "command": " ".join(sys.argv),
        "parameters": parameters,
        "text": {"sha256_16": text.digest, "bytes": len(text.train) + len(text.valid)},
        "size": vars(size),
        "pretraining": curve,
        "runs": results,
    }
    path = save_json("train-parity", record, args.out)
    path.with_suffix(".md").write_text(table(results, args.outliers))
    draw(results, args.outliers, path.with_suffix(".png"))
    print("\n" + table(results, args.outliers) + f"\n{path}")


if __name__ == "__main__":
    main()
