"""The run files that ship: each is valid and runs as it is, but for a tiny model, tiny data and few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_fixtures import LLAMA, chat_tokenizer, metrics, write_run
from transformers import AutoConfig, AutoModelForCausalLM

from halo_train.recipes import finetune
from halo_train.training.config import load_config

FILES = sorted(Path(finetune.__file__).parent.glob("*.yaml"))
TINY = ["train.steps=2", "train.epochs=null", "train.warmup_steps=1", "train.device=cpu", "data.valid=null"]
SMALLER = ["train.micro_batch=2", "train.grad_accum=2", "data.seq_len=64", "data.valid_fraction=0.3"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a chat template, and a file for each format of data."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    formats = {
        "chat": [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in rows
        ],
        "text": [{"text": row["prompt"] * 8} for row in rows],
    }  # fmt: skip
    for name, lines in formats.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    fields = {key: value for key, value in LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    model.save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_runs(file: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(file)
    if config.train.optimizer == "adamw_8bit":
        pytest.importorskip("torchao")
        # Its update is compiled for every shape of a weight, which takes minutes; the numbers are those of the same code.
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    random_weights = config.model.path.endswith(".json")
    train = {"chat.jsonl": "chat", "text.jsonl": "text"}.get(Path(config.data.train).name, "rows")
    overrides = [
        f"model.path={inputs / ('model.json' if random_weights else 'model')}",
        f"data.train={inputs / train}.jsonl",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run.dir={tmp_path}",
    ]
    finetune.run(load_config(file, [*TINY, *SMALLER, *overrides]))
    lines = [line for line in metrics(tmp_path / config.run.name) if "loss" in line]
    assert len(lines) == 2
    assert all(line["share_8bit"] > 0.5 for line in lines)
    assert (tmp_path / config.run.name / "export" / "model.safetensors").exists()


def test_what_the_files_show_is_all_there() -> None:
    """Together they use every way to save memory, and both kinds of models."""
    trains = [load_config(file).train for file in FILES]
    assert {"none", "selective", "full"} == {train.activation_checkpointing for train in trains}
    assert {"adamw", "adamw_8bit"} == {train.optimizer for train in trains}
    assert {load_config(file).model.dtype for file in FILES} == {"float32", "bfloat16"}


def test_the_model_from_scratch_has_the_size_that_it_says() -> None:
    fields = json.loads(Path(load_config(FILES[0].with_name("from_scratch.yaml")).model.path).read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert 95e6 < sum(p.numel() for p in model.parameters()) < 105e6
