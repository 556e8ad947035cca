"""The way of a user with a Hugging Face model directory and a file of messages, on the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import CHATML, LLAMA, chat_tokenizer, halo_train, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from halo_train.training.checkpoint import latest_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's directory, 28 conversations and the run file."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**values, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)  # type: ignore[arg-type]
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(28):
            a, b = divmod(i, 5)
            turns = [
                ("user", f"{a} plus {b}?"),
                ("assistant", "It is 3."),
                ("user", "Is it?"),
                ("assistant", "3."),
            ]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    (folder / "chat.yaml").write_text(
        f"""
run: {{name: chat, dir: {folder / "runs"}}}
model: {{path: model}}
data: {{train: chat.jsonl, valid_fraction: 0.15, seq_len: 64, cache_dir: {folder / "cache"}}}
train: {{epochs: 2, micro_batch: 4, grad_accum: 2, lr: 1e-2, device: cpu}}
save: {{every: 2}}
"""
    )
    return folder


def test_preprocess_shows_the_assistants_turns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("preprocess", str(folder / "chat.yaml"), "--show", "1") == 0
    out = capsys.readouterr().out
    assert "28 rows of" in out
    assert "format messages" in out
    # 24 training rows are 6 batches an epoch, two of them a step.
    assert "training steps:  6" in out
    assert "<|im_start|>assistant\n«It is 3.<|im_end|>\n»<|im_start|>user\nIs it?<|im_end|>\n" in out
    assert "<|im_start|>assistant\n«3.<|im_end|>\n»" in out


def test_messages_train_resume_and_come_back_as_a_chat_model(folder: Path) -> None:
    file, run, split = str(folder / "chat.yaml"), folder / "runs" / "chat", folder / "runs" / "split"
    assert halo_train("run", file) == 0
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    valid = [line["valid_loss"] for line in metrics(run) if "valid_loss" in line]
    assert valid[-1] < valid[0] - 1

    # The same run, ended after its fourth step as a kill would, goes on with the same steps.
    assert halo_train("run", file, "run.name=split") == 0
    lost = latest_checkpoint(split / "checkpoints")
    assert lost is not None
    lost.rename(folder / "lost")
    assert halo_train("run", file, "run.name=split") == 0
    assert metrics(split) == metrics(run)
    weights, resumed = (load_file(path / "export" / "model.safetensors") for path in (run, split))
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())

    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.chat_template == CHATML
    question = [{"role": "user", "content": "1 plus 2?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = AutoModelForCausalLM.from_pretrained(run / "export").generate(
        **prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    assert out.shape[1] > prompt["input_ids"].shape[1]


def test_a_model_without_a_chat_template_is_refused_before_it_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.json").write_text(json.dumps(LLAMA))
    arguments = [f"model.path={folder / 'model.json'}", "run.name=none"]
    assert halo_train("run", str(folder / "chat.yaml"), *arguments) == 2
    assert "has no chat template, which messages need" in capsys.readouterr().err
    assert not (folder / "runs" / "none").exists()


def test_a_warm_up_longer_than_the_epochs_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train.warmup_steps=6", "run.name=none"]
    assert halo_train("run", str(folder / "chat.yaml"), *arguments) == 2
    assert "warmup_steps must be less than the 6 steps of train.epochs=2; got 6" in capsys.readouterr().err
    assert not (folder / "runs" / "none").exists()
