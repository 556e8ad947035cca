"""The benchmark of a whole step: that it trains, with both losses, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halo_train.bench.step import LOSSES, Case, Size, Training, build, recipe_case

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_step
from bench_step import variants
from step_table import CATEGORIES, table

SIZE = Size(
    layers=1, hidden=64, intermediate=96, heads=2, kv_heads=1, vocabulary=80, batch=2, length=16
)  # fmt: skip


CASES = [*map(recipe_case, ("bf16", "fp8", "int8")), *variants("fp8"), *variants("int8")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_losses_are_the_same_training(case: Case) -> None:
    losses = []
    for loss in LOSSES:
        model = build(SIZE, case, compiled=False, checkpointing="none", device="cpu")
        torch.manual_seed(0)
        training = Training(model, SIZE, loss)
        for _ in range(3):
            training.step()
        losses.append(torch.stack(training.losses))
    assert losses[0].shape == (3,)
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=2e-3, atol=0)


ROW: dict[str, Any] = {
    "name": "fp8", "compiled": True, "checkpointing": "full", "loss": "chunked", "ms": 12.34, "speedup": 1.5,
    "tokens_per_second": 1000.0, "peak_gib": 3.25, "activations_gib": 1.0, "gpu_ms": dict.fromkeys(CATEGORIES, 2.0), "losses": [2.0],
}  # fmt: skip


def test_a_table_has_a_line_for_each_row() -> None:
    where = dict.fromkeys(("gpu", "driver", "torch", "date", "commit"), "?")
    lines = table([ROW, ROW], where, SIZE._asdict()).splitlines()
    assert lines[-1].startswith("| fp8 | compiled | full | chunked | 12.3 | 1.50 | 1000 | 3.2 | 1.0 |")
    assert {line.count("|") for line in lines[2:]} == {15}
    assert len(lines) == 6


def test_rows_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure_case(size: Size, case: Case, **_: Any) -> dict[str, Any]:
        if case.name == "int8":
            raise torch.OutOfMemoryError
        return ROW | {"name": case.name}

    monkeypatch.setattr("halo_train.bench.step.measure_case", measure_case)
    monkeypatch.setattr("bench_step.require_gpu", lambda parser: None)
    only = ["--mode", "eager", "--checkpointing", "none", "--only", "bf16", "fp8", "int8"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *only, "--out", str(tmp_path)])
    with pytest.raises(torch.OutOfMemoryError):
        bench_step.main()
    (written,) = tmp_path.iterdir()
    assert [row["name"] for row in json.loads(written.read_text())["rows"]] == ["bf16", "fp8"]
