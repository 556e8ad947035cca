"""halo-train compare: what is planned, that one failure leaves the others whole, and the figures against the runs' own files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_fixtures import halo_train, metrics, write_run

from halo_train.training import compare
from halo_train.training.compare import Comparison, plan
from halo_train.training.compare_report import mean_gaps, read_lines
from halo_train.training.config import is_list
from halo_train.training.errors import UserError


def test_the_plan_is_every_value_under_every_condition(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    planned = plan(file, ["run.seed=0,1", "quant.recipe=bf16,int8", "train.lr=1e-3"], 5)
    assert planned.compared == "quant.recipe"
    assert planned.folder == tmp_path / "runs" / "tiny-compare"
    names = ["bf16+seed=0", "int8+seed=0", "bf16+seed=1", "int8+seed=1"]
    assert [member.name for member in planned.members] == names
    assert [planned.reference(member).name for member in planned.members] == [names[0]] * 2 + [names[2]] * 2
    for member in planned.members:
        config = member.config
        assert (config.train.steps, config.train.lr) == (5, 1e-3)
        assert member.name == f"{config.quant.recipe}+seed={config.run.seed}"
        assert member.folder == planned.folder / member.name
    assert not planned.folder.exists()


def test_any_field_is_compared_and_lists_keep_their_commas(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    planned = plan(file, ["train.lr=1e-3,1e-2", "log.quant_what_if=fp8,int8"], None)
    assert [member.name for member in planned.members] == ["lr=1e-3", "lr=1e-2"]
    assert all(member.config.log.quant_what_if == ["fp8", "int8"] for member in planned.members)
    assert [m.name for m in plan(file, ["run.seed=3,4"], None).members] == ["seed=3", "seed=4"]
    assert is_list("log.quant_layers")
    assert not is_list("quant.recipe")
    assert not is_list("nonsense")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.recipe=fp8"], r"several values, separated by commas.*got quant.recipe=fp8"),
        ([], "got none"),
        (["quant.recipe=fp8,fp8"], "two values have the same name"),
        (["quant.recipe=fp8,int9"], r"quant\.recipe: must be one of .*got 'int9'"),
        (["quant.recipe=bf16,fp8", "train.step=3"], r"train\.step: unknown key"),
    ],
)
def test_a_faulty_plan_is_refused_before_anything_runs(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(write_run(tmp_path), overrides, 2)
    assert not (tmp_path / "runs").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny-compare"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no comparison of halo_train"):
        plan(write_run(tmp_path), ["quant.recipe=bf16,fp8", "run.overwrite=true"], 2)


def test_compare_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two precisions and one that cannot run; then the missing one again, which leaves the finished runs alone."""
    file = write_run(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    arguments = ["compare", str(file), f"quant.recipe=bf16,{broken},int8", "--steps", "3"]
    assert halo_train(*arguments) == 1
    out, err = capfd.readouterr()
    folder = tmp_path / "runs" / "tiny-compare"
    assert "1 of 3 runs failed: broken" in err
    assert "broken.json must be a JSON object" in err  # the reason stays visible
    assert re.search(r"bf16 .*│ +\+0\.0000 ", out)
    assert re.search(r"broken .*failed \(2\)", out)

    record = json.loads((folder / "compare.json").read_text())
    assert record["failed"] == {"broken": 2}
    bf16, int8 = record["results"]
    for line, name in ((bf16, "bf16"), (int8, "int8")):
        summary = json.loads((folder / name / "summary.json").read_text())
        assert line["valid_loss"] == summary["valid_after"]
        assert line["gap"] == summary["valid_after"] - bf16["valid_loss"]
    # Close, but not equal: equal losses would mean that the run was not in 8 bits at all.
    assert 0 < abs(int8["gap"]) < 0.1
    assert (bf16["share_8bit"], int8["share_8bit"] > 0.3) == (0, True)
    assert all(
        bf16["sqnr_db"][product] > int8["sqnr_db"][product] + 5 for product in ("fprop", "dgrad", "wgrad")
    )
    seen = [
        [(line["tokens"], line["trained_tokens"], line["lr"]) for line in metrics(folder / name) if "loss" in line]
        for name in ("bf16", "int8")
    ]  # fmt: skip
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"| int8 | {int8['valid_loss']:.4f} | {int8['gap']:+.4f} |" in (folder / "compare.md").read_text()

    assert halo_train(*arguments, "run.resume=never") == 2
    assert "run.resume=auto" in capfd.readouterr().err
    broken.write_text('{"recipe": {"*": "fp8"}}')
    before = (folder / "bf16" / "summary.json").stat().st_mtime_ns
    assert halo_train(*arguments) == 0
    assert "[1/3] bf16: finished before" in capfd.readouterr().out
    assert (folder / "bf16" / "summary.json").stat().st_mtime_ns == before
    assert len(json.loads((folder / "compare.json").read_text())["results"]) == 3

    assert halo_train(*arguments, "train.lr=1e-3") == 2
    assert "was started with other settings: train.lr was 0.01, now 0.001" in capfd.readouterr().err


def test_a_signal_stops_the_run_in_progress_and_the_comparison(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    command = [sys.executable, "-m", "halo_train.cli", "compare", str(file), "quant.recipe=bf16,fp8"]
    command += ["train.steps=100000", "save.every=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "tiny-compare" / "bf16"
    try:
        deadline = time.monotonic() + 60
        while len(metrics(run) if (run / "metrics.jsonl").exists() else []) < 3:
            assert time.monotonic() < deadline, "the first run did not start"
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "stopped in bf16; repeat the command to go on" in err
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert not (run.parent / "fp8").exists()


def test_gaps_are_within_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that differ by seed: the gap is from the bf16 run of the same seed, not from the first of all."""
    planned = plan(write_run(tmp_path), ["quant.recipe=bf16,fp8", "run.seed=0,1,2"], 2)
    losses = {"bf16": [1.0, 3.0, 5.0], "fp8": [1.1, 3.2, 5.3]}
    for member in planned.members:
        member.folder.mkdir(parents=True)
        summary = {
            "valid_after": losses[member.value][member.config.run.seed],
            "train_loss": 1.0,
            "tokens_per_second": 10.0,
            "share_8bit": 0.5,
            "peak_memory_gib": None,
            "errors": {},
            "exact_match": None,
            "emulated_on_cpu": True,
        }
        (member.folder / "summary.json").write_text(json.dumps(summary))
    lines = read_lines(planned)
    assert [line.gap for line in lines] == pytest.approx([0, 0.1, 0, 0.2, 0, 0.3])
    assert mean_gaps(lines)["fp8"] == pytest.approx([0.1, 0.2, 0.3])
    # A gap needs the run that it is measured from.
    (planned.folder / "bf16+seed=1" / "summary.json").unlink()
    assert [line.gap is None for line in read_lines(planned)] == [False, False, True, False, False]


def test_a_run_that_is_killed_by_the_system_is_a_failure_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(write_run(tmp_path), ["quant.recipe=bf16,fp8"], 2)
    monkeypatch.setattr(compare, "_run", lambda file, nproc, stop: -9 if file.stem == "bf16" else 0)
    assert compare.run_members(Comparison(planned.folder, planned.compared, planned.members, False)) == {
        "bf16": -9
    }
