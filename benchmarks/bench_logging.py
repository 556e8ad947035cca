"""What writing down a step costs the host: metrics.jsonl and progress, and with Weights & Biases (offline) and TensorBoard where installed.

    python benchmarks/bench_logging.py --step-ms 30

Everything the recipe does with the numbers of a step, per step, beside a training step of that length. The loop waits for the
loss anyway, to stop at one that is not finite.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import tempfile
import time
from pathlib import Path

import numpy as np

from halo_train.training.config import LogSection
from halo_train.training.logging import MetricsFile, ProgressBar
from halo_train.training.trackers import Trackers

STEPS = 2000
NUMBERS = (
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "tokens_per_second",
    "data_wait",
    "share_8bit",
    "mfu",
    "peak_memory_gib",
)


def seconds_of_steps(log: LogSection, folder: Path) -> np.ndarray:
    """Of each step."""
    values = {name: 1 / 3 + i for i, name in enumerate(NUMBERS)}
    seconds = []
    with (
        MetricsFile(folder / "metrics.jsonl", 0) as metrics,
        Trackers(log, folder, "bench", {}, 0) as trackers,
        ProgressBar("bench", STEPS, 0, log.every) as bar,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for step in range(1, STEPS + 1):
            started = time.perf_counter()
            metrics.write(step=step, **values)
            trackers.log(step, **values)
            bar.step(step, loss=values["loss"], tokens_s=values["tokens_per_second"])
            seconds.append(time.perf_counter() - started)
    return np.array(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--step-ms", type=float, default=100, help="length of the training step to compare with"
    )
    step_ms = parser.parse_args().step_ms
    cases = {"metrics.jsonl and progress": {}}
    for package, field in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        if importlib.util.find_spec(package):
            cases[f"the same and {package}"] = {field: True}
    for name, fields in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            ms = 1e3 * seconds_of_steps(LogSection(**fields), Path(folder))
        print(
            f"{name}: {ms.mean():.3f} ms a step (median {np.median(ms):.3f}, 99% within {np.quantile(ms, 0.99):.3f}): "
            f"{100 * ms.mean() / step_ms:.2f}% of {step_ms:g} ms"
        )


if __name__ == "__main__":
    main()
