"""A run so small that a test can afford several: 24 rows, a two-layer Llama 32 wide."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from halo_train.cli import main
from halo_train.recipes import finetune
from halo_train.training import logging as run_logging
from halo_train.training.config import load_config
from halo_train.training.errors import Interrupted
from halo_train.training.model import train_tokenizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A small tokenizer with the two special tokens of ChatML and a chat template."""
    tokenizer = train_tokenizer(["system user assistant", "What is 1 plus 2? It is 3."] * 3, 290)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def write_run(folder: Path, rows: int = 24, model: dict[str, object] = LLAMA) -> Path:
    """Writes tiny.yaml with its model and data; its runs go to ``folder / "runs"``."""
    (folder / "model.json").write_text(json.dumps(model))
    lines = [
        {"prompt": f"def f{i}(x): return x + {i}\n", "completion": f"Add {i} to x."} for i in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
run: {{name: tiny, dir: {folder / "runs"}}}
model: {{path: model.json}}
data: {{train: rows.jsonl, valid_fraction: 0.2, seq_len: 48, cache_dir: {folder / "cache"}}}
train: {{steps: 6, micro_batch: 4, grad_accum: 2, lr: 1e-2, device: cpu}}
save: {{every: 2}}
log: {{eval_every: 3}}
"""
    )
    return path


def halo_train(*arguments: str) -> int:
    """Runs the command line in this process; returns its exit code."""
    before = sys.argv
    sys.argv = ["halo-train", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    pytest.fail("main() has to end in SystemExit")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Runs get signal ``number`` after step ``step``."""
    show = run_logging.ProgressBar.step

    def show_and_stop(self: run_logging.ProgressBar, now: int, **values: float) -> None:
        show(self, now, **values)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run_logging.ProgressBar, "step", show_and_stop)


def run_in_two_parts(
    folder: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, **write: Any
) -> tuple[Path, Path]:
    """The folders of two equal runs of six steps, of which the second was stopped after three and resumed."""
    runs = []
    for name in ("whole", "parts"):
        (folder / name).mkdir()
        file = write_run(folder / name, **write)
        runs.append(folder / name / "runs" / "tiny")
        if name == "parts":
            with monkeypatch.context() as patch:
                stop_after(patch, 3)
                with pytest.raises(Interrupted):
                    finetune.run(load_config(file, overrides))
        finetune.run(load_config(file, overrides))
    return runs[0], runs[1]


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl without the clock's figures."""
    clock = ("tokens_per_second", "data_wait")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]
