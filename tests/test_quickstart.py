"""The command of the README, as a user types it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from halo_train.recipes import finetune

QUICKSTART = Path(finetune.__file__).with_name("quickstart.yaml")


def _run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    recipes = "quant.recipe=bf16,fp8"
    command = [sys.executable, "-m", "halo_train.cli", "compare", str(QUICKSTART), recipes, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_shortened_quickstart_runs_from_any_folder(tmp_path: Path) -> None:
    done = _run(
        tmp_path, "train.steps=12", "train.micro_batch=4", "data.valid_fraction=0.005", "train.device=cpu"
    )
    assert done.returncode == 0, done.stderr
    # Nothing but progress belongs on the screen of a first-time user.
    assert "Warning" not in done.stderr
    assert "Failed to load" not in done.stderr
    assert "collecting the documented functions" in done.stdout
    folder = tmp_path / "runs" / "quickstart-compare"
    summary = json.loads((folder / "fp8" / "summary.json").read_text())
    assert summary["valid_after"] < summary["valid_before"] - 0.3
    assert abs(json.loads((folder / "compare.json").read_text())["results"][1]["gap"]) < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns_as_the_readme_says(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "quickstart-compare"
    run = folder / "fp8"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["valid_after"] < summary["valid_before"] - 1.5
    assert abs(json.loads((folder / "compare.json").read_text())["results"][1]["gap"]) < 0.03
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    prompt = tokenizer("def add(a, b):\n    return a + b\n", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    shutil.rmtree(folder)
