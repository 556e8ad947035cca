"""The benchmark of a whole step: that it trains, with both losses, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halo_train import convert_to_halo_training, equalizer_state_dict, load_equalizer_state_dict
from halo_train.bench.step import LOSSES, Case, Size, Training, build, recipe_case

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_step
from bench_step import variants
from step_table import CATEGORIES, table

SIZE = Size(
    layers=1, hidden=64, intermediate=96, heads=2, kv_heads=1, vocabulary=80, batch=2, length=16
)  # fmt: skip

LEARNING = SIZE._replace(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=256, length=64)


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


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_hundred_fused_steps_end_where_layers_one_by_one_do(recipe: str) -> None:
    """With the same factors: what another order of the rows does to the loss is the measure."""
    gaps, noise = [], []
    for seed in range(3):
        fused, state = last_losses(recipe, True, seed)
        apart, _ = last_losses(recipe, False, seed, state)
        reordered, _ = last_losses(recipe, False, seed, state, flip=True)
        gaps.append(abs(fused - apart))
        noise.append(abs(reordered - apart))
    assert sum(gaps) < 3 * sum(noise)
    assert max(gaps) < 2e-3 * apart


def last_losses(
    recipe: str, fuse: bool, seed: int, state: dict[str, Tensor] | None = None, flip: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Mean of the last ten of 100 steps on one batch, and the equalisation factors: those given, or of that batch."""
    case = Case(recipe, lambda model: convert_to_halo_training(model, recipe=recipe, fuse=fuse))
    model = build(LEARNING, case, compiled=False, checkpointing="none", device="cpu")
    torch.manual_seed(seed)
    training = Training(model, LEARNING, "chunked")
    if flip:
        training.tokens, training.labels = training.tokens.flip(0), training.labels.flip(0)
    if state is None:
        with torch.no_grad():
            model(training.tokens)
        state = equalizer_state_dict(model)
    else:
        load_equalizer_state_dict(model, state)
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(100):
        training.step()
    return torch.stack(training.losses[-10:]).float().mean().item(), state
