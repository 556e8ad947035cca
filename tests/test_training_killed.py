"""A run of several processes, all killed at once, and resumed by fewer of them: the curve goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_fixtures import metrics, write_run

from halo_train.training.checkpoint import latest_checkpoint
from halo_train.training.model import build_model, export_model, train_tokenizer

STEPS, EVERY = 40, 5
PATIENCE = 150
"""Seconds for one start; importing transformers in several processes takes 40 of them on a busy machine."""


class Run:
    """``halo-train run``, ended at the latest with the context.

    Args:
        nproc: processes of each node.
        nodes: as many torchruns as on machines of their own, which meet at a port; None is ``--nproc``.
    """

    def __init__(
        self, file: Path, nproc: int, device: str, *overrides: str, nodes: int | None = None
    ) -> None:
        self.folder = file.parent / "runs" / "tiny"
        self._log = (file.parent / f"{nproc}.log").open("w+")
        settings = [
            f"train.device={device}",
            f"train.steps={STEPS}",
            f"save.every={EVERY}",
            "train.grad_accum=4",
        ]
        program = ["-m", "halo_train.cli", "run", str(file), *settings, "log.eval_every=20", *overrides]
        if nodes is None:
            command = [sys.executable, *program, f"--nproc={nproc}"]
        else:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=run"]
            torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", *meeting]
            command = [*torchrun, f"--nproc-per-node={nproc}", *program]
        self._nodes = [
            subprocess.Popen(
                command, stdout=self._log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            for _ in range(nodes or 1)
        ]

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint is on the disk and ``step`` in the metrics."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and all(node.poll() is None for node in self._nodes):
            file = self.folder / "metrics.jsonl"
            lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
            done = max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
            if done >= step and latest_checkpoint(self.folder / "checkpoints") is not None:
                return
            time.sleep(0.02)
        pytest.fail(f"not at step {step} with a checkpoint: {self.output()}")

    def kill(self, node: int = 0) -> None:
        """SIGKILL to a torchrun and its processes, which it has put into sessions of their own."""
        torchrun = self._nodes[node]
        for process in (torchrun.pid, *children(torchrun.pid)):
            os.kill(process, signal.SIGKILL)
        assert torchrun.wait(10) == -signal.SIGKILL

    def finish(self, node: int = 0) -> int:
        """The exit code of a node, after it has come to its end."""
        return self._nodes[node].wait(PATIENCE)

    def output(self) -> str:
        """What all nodes printed."""
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for i, node in enumerate(self._nodes):
            if node.poll() is None:
                self.kill(i)
        self._log.close()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def children(process: int) -> list[int]:
    """Processes that were started by ``process`` or by one that it started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    found = [process]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def curve(run: Path, key: str) -> dict[int, float]:
    return {int(line["step"]): line[key] for line in metrics(run) if key in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cpu", 2, 1),
        pytest.param("cuda", 2, 1, marks=pytest.mark.multi_gpu(2)),
        pytest.param("cuda", 4, 2, marks=pytest.mark.multi_gpu(4)),
    ],
)
def test_killed_and_resumed_by_fewer(tmp_path: Path, device: str, before: int, after: int) -> None:
    files = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        files.append(write_run(tmp_path / name))
    # Of random weights one process would draw others on a GPU than several.
    tokenizer = train_tokenizer(["def f(x): return x + 1", "Add 1 to x."] * 3, 290)
    model = build_model(tmp_path / "whole" / "model.json", tokenizer, 0, 64, torch.float32)
    export_model(model, tokenizer, tmp_path / "hf")
    settings = f"model.path={tmp_path / 'hf'}", "train.micro_batch=2", "train.lr=5e-3"
    again = (*settings, "save.background=true")
    with Run(files[0], after, device, *settings) as whole:
        with Run(files[1], before, device, *again) as killed:
            killed.wait_for_step(EVERY + 3)
            killed.kill()
        seen = curve(killed.folder, "loss")
        assert max(seen) < STEPS, "it came to the end before it was killed"
        checkpoint = latest_checkpoint(killed.folder / "checkpoints")
        assert checkpoint is not None
        with Run(files[1], after, device, *again) as resumed_run:
            assert resumed_run.finish() == 0, resumed_run.output()
            assert f"resumed from {checkpoint}" in resumed_run.output()
        assert whole.finish() == 0, whole.output()
    resumed = int(checkpoint.name.removeprefix("step-"))
    expected, found = (curve(run.folder, "loss") for run in (whole, killed))
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    print(f"\n{before} processes killed after step {max(seen)}, {after} resumed from step {resumed}")
    print("step   whole  resumed  difference")
    for step in sorted({*range(resumed - 1, resumed + 6), *range(EVERY, STEPS + 1, EVERY)}):
        print(f"{step:4}{expected[step]:9.4f}{found[step]:9.4f}{found[step] - expected[step]:12.4f}")
    # The steps up to the checkpoint are those of the run that was killed, which the resumed one leaves as they are.
    assert all(found[step] == seen[step] for step in range(1, resumed + 1))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=0.02), step
    assert expected[STEPS] < expected[resumed] - 0.5
    for step, loss in curve(whole.folder, "valid_loss").items():
        assert curve(killed.folder, "valid_loss")[step] == pytest.approx(loss, rel=0.02), step


@pytest.mark.slow
def test_a_node_dies_and_the_run_goes_on(tmp_path: Path) -> None:
    """Two torchruns, as of two machines: the end of one ends the other; started again they go on from the checkpoint."""
    file = write_run(tmp_path)
    with Run(file, 1, "cpu", nodes=2) as run:
        run.wait_for_step(EVERY + 1)
        run.kill(node=1)
        assert run.finish(node=0) not in (0, -signal.SIGKILL)
        assert "Connection" in run.output()
    before = curve(run.folder, "loss")
    with Run(file, 1, "cpu", nodes=2) as run:
        assert [run.finish(node) for node in range(2)] == [0, 0], run.output()
        assert "resumed from" in run.output()
    after = curve(run.folder, "loss")
    assert sorted(after) == list(range(1, STEPS + 1))
    for step, loss in before.items():
        assert after[step] == pytest.approx(loss, rel=1e-3), step
    assert json.loads((run.folder / "summary.json").read_text())["processes"] == 2
