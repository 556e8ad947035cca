"""Runs of several processes: the curve of one, checkpoints for any number of them, a plain model, errors that end all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_fixtures import halo_train, metrics, write_run
from transformers import AutoModelForCausalLM

from halo_train.training.model import build_model, export_model, train_tokenizer

RUN = ["train.grad_accum=6", "train.micro_batch=2"]


def start(file: Path, nproc: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = ["run", str(file), f"--nproc={nproc}", *RUN, *overrides]
    return subprocess.run(
        [sys.executable, "-m", "halo_train.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def curve(run: Path, key: str) -> dict[int, float]:
    return {int(line["step"]): line[key] for line in metrics(run) if key in line}


@pytest.mark.slow
def test_two_processes_then_three_then_one(tmp_path: Path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "two").mkdir()
    assert halo_train("run", str(write_run(tmp_path / "alone")), *RUN) == 0
    file = write_run(tmp_path / "two")
    one, several = tmp_path / "alone" / "runs" / "tiny", tmp_path / "two" / "runs" / "tiny"
    result = start(file, 2, "save.background=true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("validation loss:") == 1
    for key in ("loss", "valid_loss", "trained_tokens"):
        for step, value in curve(one, key).items():
            assert curve(several, key)[step] == pytest.approx(value, rel=0.03), (key, step)
    # Later ones follow weights that have drifted apart by the order of sums, at a learning rate of 0.01.
    assert curve(several, "grad_norm")[1] == pytest.approx(curve(one, "grad_norm")[1], rel=0.03)
    assert json.loads((several / "summary.json").read_text())["processes"] == 2

    model, info = AutoModelForCausalLM.from_pretrained(several / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM" == model.config.architectures[0]
    before = {name: p.clone() for name, p in model.named_parameters()}

    # The last steps again, from the checkpoint of two processes, by three and by one.
    losses = curve(several, "loss")
    for nproc in (3, 1):
        shutil.rmtree(several / "checkpoints" / "step-6")
        result = start(file, nproc)
        assert result.returncode == 0, result.stderr
        assert "step-4" in result.stdout
        for step, loss in curve(several, "loss").items():
            assert loss == pytest.approx(losses[step], rel=0.03), (nproc, step)
        again = AutoModelForCausalLM.from_pretrained(several / "export")
        for name, p in again.named_parameters():
            torch.testing.assert_close(p, before[name], rtol=0.1, atol=0.03, msg=name)


def factors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """log2 d of the layers, of a checkpoint."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step}", run / "state.pt")
    return torch.load(run / "state.pt", weights_only=False).get("equalizer", {})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "fp8_plain"])
def test_the_first_steps_are_those_of_one_process(tmp_path: Path, recipe: str):
    asked = [
        f"quant.recipe={recipe}",
        "quant.output_layer=true",
        "train.steps=2",
        "train.activation_checkpointing=selective",
    ]
    runs = []
    for name in ("alone", "three"):
        (tmp_path / name).mkdir()
        file = write_run(tmp_path / name)
        runs.append(tmp_path / name / "runs" / "tiny")
    assert halo_train("run", str(tmp_path / "alone" / "tiny.yaml"), *RUN, *asked) == 0
    result = start(file, 3, *asked)
    assert result.returncode == 0, result.stderr
    one, three = (curve(run, "loss") for run in runs)
    assert three[1] == pytest.approx(one[1], rel=1e-6)
    # One process rounds W of int8 once more for dgrad, where three fold it.
    assert three[2] == pytest.approx(one[2], rel=1e-3 if recipe == "int8" else 1e-5)
    one_factors, three_factors = (factors(run, 2) for run in runs)
    assert len(one_factors) == (15 if recipe == "int8" else 0)
    assert one_factors.keys() == three_factors.keys()
    assert all(torch.equal(three_factors[name], exponent) for name, exponent in one_factors.items())


@pytest.mark.slow
def test_two_processes_from_a_directory_packed_with_answers(tmp_path: Path):
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
        file = write_run(tmp_path / name)
    tokenizer = train_tokenizer(["def f(x): return x + 1", "Add 1 to x."] * 3, 290)
    config = tmp_path / "two" / "model.json"
    export_model(build_model(config, tokenizer, 0, 64, torch.bfloat16), tokenizer, tmp_path / "hf")
    asked = [
        f"model.path={tmp_path / 'hf'}",
        "data.packing=true",
        f"eval.exact_match={tmp_path / 'two' / 'rows.jsonl'}",
        "eval.batch=5",
        "eval.max_new_tokens=6",
        "log.eval_every=6",
    ]
    assert halo_train("run", str(tmp_path / "alone" / "tiny.yaml"), *RUN, *asked) == 0
    result = start(file, 2, *asked)
    assert result.returncode == 0, result.stderr
    assert "into its CPU memory" not in result.stdout
    one, several = tmp_path / "alone" / "runs" / "tiny", tmp_path / "two" / "runs" / "tiny"
    for key in ("loss", "valid_loss"):
        for step, value in curve(one, key).items():
            assert curve(several, key)[step] == pytest.approx(value, rel=0.03), (key, step)
    scores = [json.loads((run / "answers" / "step-6.json").read_text()) for run in (one, several)]
    assert [len(score["samples"]) for score in scores] == [24, 24]
    assert [s["prompt"] for s in scores[0]["samples"]] == [s["prompt"] for s in scores[1]["samples"]]
    assert all(s["generated"] for s in scores[1]["samples"])
    assert curve(several, "exact_match") == {6: scores[1]["exact_match"]}


@pytest.mark.slow
def test_a_failing_process_ends_the_run_with_its_traceback(tmp_path: Path):
    file = write_run(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from halo_train.training import optim\n"
        "    def fail(step, *rest):\n"
        "        if step == 3: raise ZeroDivisionError('of rank 1')\n"
        "        return 1e-3\n"
        "    optim.learning_rate = fail\n"
    )
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "halo_train.cli", "run", str(file), "--nproc=2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode != 0
    # Its own traceback, before those of the others, whose connections end.
    errors = [
        line for line in result.stderr.splitlines() if re.search(r"^(\[rank\d\]: )?\w+(\.\w+)*Error: ", line)
    ]
    assert "ZeroDivisionError: of rank 1" in errors[0], result.stderr
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "step-2").is_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.grad_accum=3", r"train\.grad_accum .* must be a multiple of 2; got 3"),
        ("train.optimizer=adamw_8bit", r"train\.optimizer must be adamw with several processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path: Path, override: str, message: str):
    from halo_train.training.config import load_config
    from halo_train.training.distributed import require_several_possible
    from halo_train.training.errors import UserError

    config = load_config(write_run(tmp_path), [override])
    with pytest.raises(UserError, match=message):
        require_several_possible(config, 2)
    require_several_possible(config, 1)
