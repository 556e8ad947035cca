"""What the data path costs: tokenising a large file, its memory, a packed batch, and the wait for it behind a training step.

    python benchmarks/bench_data.py --megabytes 2000 --processes 1 2

Text: Python's library, in pieces, again and again; a byte-level BPE tokenizer of 32,000
entries trained on it. Memory is the anonymous part: pages of mapped files are the system's to take back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from halo_train.training import tokenised
from halo_train.training.data import BatchStream, Split
from halo_train.training.formats import row_format
from halo_train.training.model import train_tokenizer
from halo_train.training.sources import open_source

PIECE = 3000  # characters


class PeakMemory(threading.Thread):
    """MiB of anonymous memory: the most of this process, of one of its children, and of all together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_mib = self.main = anonymous_mib("self")
        self.child = self.together = 0
        self.start()

    def run(self) -> None:
        while True:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            main, each = anonymous_mib("self"), [anonymous_mib(child) for child in children]
            self.main, self.child = max(self.main, main), max(self.child, *each, 0)
            self.together = max(self.together, main + sum(each))
            time.sleep(0.2)


def anonymous_mib(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return sum(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))


def pieces() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield from (text[i : i + PIECE] for i in range(0, min(len(text), 20 * PIECE), PIECE))


def write_file(path: Path, megabytes: int, texts: list[str]) -> None:
    rng, left = random.Random(0), megabytes * 10**6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            text = rng.choice(texts)
            left -= file.write(json.dumps({"text": text[: rng.randint(1, len(text))]}) + "\n")


def encode(path: Path, tokenizer: Any, processes: int, cache: Path, seq_len: int) -> Split:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processes])
    memory, started, cpu = PeakMemory(), time.perf_counter(), os.times()
    source = open_source(str(path), None, "train", "data.train")
    store = tokenised.tokenised(source, row_format(source, "auto", {}), tokenizer, seq_len, cache)
    seconds, after = time.perf_counter() - started, os.times()
    cpu_seconds = sum(after[:4]) - sum(cpu[:4])
    tokens = int(store.lengths().sum())
    print(
        f"{processes} processes: {seconds:.0f} s, {tokens / seconds / 1e3:.0f}k tokens/s, {tokens / cpu_seconds / 1e3:.0f}k tokens "
        f"a second of CPU; memory {memory.start_mib} MiB before, {memory.main} at most, {memory.child} in a child, "
        f"{memory.together} together; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    started = time.perf_counter()
    split = Split(store, np.arange(store.rows), "data.train", seq_len=seq_len, packing=True)
    print(f"packed in {time.perf_counter() - started:.1f} s: {split}; {memory.main} MiB", flush=True)
    return split


def measure_stream(split: Split, micro_batch: int, step_ms: int) -> None:
    for label, pause in (("back to back", 0.0), (f"behind a step of {step_ms} ms", step_ms / 1e3)):
        waits = []
        with BatchStream(split, micro_batch, 0, 0) as stream:
            next(stream)
            for _ in range(100):
                time.sleep(pause)
                started = time.perf_counter()
                next(stream)
                waits.append(1e3 * (time.perf_counter() - started))
        print(
            f"wait for a batch of {micro_batch} x {split.width}, {label}: median {np.median(waits):.2f} ms, mean {np.mean(waits):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--step-ms", type=int, default=100)
    arguments = parser.parse_args()
    texts = list(pieces())
    tokenizer = train_tokenizer(itertools.islice(texts, 5000), 32000)
    everywhere = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_file(path, arguments.megabytes, texts)
        for processes in arguments.processes:
            cache = Path(folder) / str(processes)
            split = encode(path, tokenizer, processes, cache, arguments.seq_len)
            os.sched_setaffinity(0, everywhere)
        measure_stream(split, arguments.micro_batch, arguments.step_ms)


if __name__ == "__main__":
    main()
