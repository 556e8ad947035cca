"""Generation in batches against one prompt at a time, answers against GSM8K's rules, and halo-train eval on a trained model."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from training_fixtures import chat_tokenizer, halo_train, metrics, write_run
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from halo_train import convert_to_halo_training
from halo_train.recipes import finetune
from halo_train.training.config import load_config
from halo_train.training.errors import UserError
from halo_train.training.exact_match import answer_in, exact_match, questions, stop_ids
from halo_train.training.formats import Conversation, Row
from halo_train.training.generate import greedy
from halo_train.training.model import train_tokenizer

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8},
    "mistral": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions
    "gpt_neox": {**SIZES, "intermediate_size": 48},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **FAMILIES[family], eos_token_id=96, bos_token_id=95, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)  # texts that depend on the prompt instead of one token repeated
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_writes_what_each_prompt_alone_does(family: str) -> None:
    """The argmax after the whole text, computed without padding and without a cache, in float64."""
    model = _model(family)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 94, (n,), generator=generator).tolist() for n in (3, 17, 1, 9, 9, 2, 30)]
    stop = [5, 11, 40]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            with torch.no_grad():
                token = model.eval()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            if token in stop:
                break
            ids.append(token)
        expected.append(ids[len(prompt) :])
    assert len({tuple(new) for new in expected}) >= 4, "the test needs texts that differ"
    finished: list[int] = []
    model.train()
    written = greedy(
        model, prompts, max_new_tokens=12, stop_ids=stop, pad_id=0, batch=3, progress=finished.append
    )
    assert written == expected
    assert finished == [3, 3, 1]
    assert model.training


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_converted_model_generates_on_a_gpu(recipe: str) -> None:
    """Steps of one token a row, 3 rows: fewer than any tile. A mask or position that is off by one changes most texts."""
    model = _model("llama").to("cuda", torch.float32)
    prompts = [torch.randint(1, 94, (n,)).tolist() for n in (3, 17, 1, 9, 30)]
    convert_to_halo_training(model, recipe=recipe, module_filter_fn=lambda module, name: name != "lm_head")
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randint(1, 94, (4, 32), device="cuda"))  # the layers take their equaliser
        settings = {"max_new_tokens": 12, "stop_ids": [95], "pad_id": 0}
        together = greedy(model, prompts, batch=3, **settings)
        alone = [greedy(model, [prompt], batch=1, **settings)[0] for prompt in prompts]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 4


def test_the_models_own_settings_do_not_count() -> None:
    model = _model("llama")
    plain = greedy(model, [[3, 4, 5]], max_new_tokens=12, stop_ids=[96], pad_id=0, batch=1)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=50.0, max_length=4)
    model.generation_config = own
    assert greedy(model, [[3, 4, 5]], max_new_tokens=12, stop_ids=[96], pad_id=0, batch=1) == plain
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### $18.00", "18"),
        ("#### -3.50.", "-3.5"),
        ("#### 1000000", "1000000"),  # not 1E+6
        ("#### 5\n#### 6", "5"),
        ("#### twelve apples ", "twelve apples"),
        ("#### 1, 2", "1, 2"),
        ("####", None),
        ("no mark 42", None),
    ],
)
def test_answers_after_the_mark(text: str, answer: str | None) -> None:
    assert answer_in(text, "####") == answer


def test_other_patterns() -> None:
    assert answer_in(r"so \boxed{7}.", r"\\boxed\{([^}]*)\}") == "7"
    assert answer_in(" Paris\n", None) == "Paris"
    assert answer_in("x", r"(y)|x") is None


def test_questions_are_the_prompts_of_training() -> None:
    tokenizer = train_tokenizer(["1 + 1 = 2"] * 3, 280)
    (asked,) = questions([Row("1 + 1 =", " 2\n#### 2")], tokenizer, "####", "file")
    assert (tokenizer.decode(asked.ids), asked.expected) == ("1 + 1 =", "2")
    with pytest.raises(
        UserError, match=r"file, row 2: its answer, 'two', has nothing after the pattern '####'"
    ):
        questions([Row("a", "#### 1"), Row("b", "two")], tokenizer, "####", "file")
    with pytest.raises(UserError, match="has no prompt to answer"):
        questions([Row(None, "#### 1")], tokenizer, "####", "file")
    with pytest.raises(UserError, match="not a regular expression"):
        questions([Row("a", "b")], tokenizer, "(", "file")


def test_a_conversation_is_asked_through_the_template_and_stops_at_its_end() -> None:
    tokenizer = chat_tokenizer()
    chat = [
        {"role": "user", "content": "1 plus 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "plus 1?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    (asked,) = questions([Conversation(chat, "file, line 1")], tokenizer, "It is", "file")
    assert asked.prompt.endswith("plus 1?<|im_end|>\n<|im_start|>assistant\n")
    assert "It is 4" not in asked.prompt
    assert asked.expected == "4"
    model = _model("llama")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(model, tokenizer) == sorted({end, tokenizer.eos_token_id, 96})


def test_prompts_too_long_for_the_model_are_wrong_not_an_error() -> None:
    tokenizer = train_tokenizer(["1 + 1 = 2"] * 3, 280)
    config = AutoConfig.for_model(
        "llama", **{**FAMILIES["llama"], "vocab_size": 280}, max_position_embeddings=32
    )
    asked = questions([Row("1" * 40, "#### 1"), Row("1", "#### 1")], tokenizer, "####", "file")
    model = AutoModelForCausalLM.from_config(config)
    score = exact_match(model, tokenizer, asked, "####", max_new_tokens=8, batch=4)
    assert [sample.generated == "" for sample in score.samples] == [True, False]
    assert score.to_dict()["without_answer"] == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its rows by heart."""
    folder = tmp_path_factory.mktemp("trained")
    file = write_run(folder, rows=4)
    rows = [{"prompt": f"Number {i}?", "completion": f" It is\n#### {i}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.valid={folder / 'rows.jsonl'}", "train.steps=60", "quant.recipe=bf16"]
    changes += ["train.activation_checkpointing=full"]  # generation keeps its cache all the same
    asked = [f"eval.exact_match={folder / 'rows.jsonl'}", "eval.pattern=####", "eval.every=25"]
    finetune.run(load_config(file, [*changes, *asked, "eval.max_new_tokens=16", "eval.limit=3"]))
    return folder


def test_a_run_answers_on_the_way(trained: Path) -> None:
    run = trained / "runs" / "tiny"
    scores = [(line["step"], line["exact_match"]) for line in metrics(run) if "exact_match" in line]
    assert [step for step, _ in scores] == [25, 50, 60]
    assert json.loads((run / "summary.json").read_text())["exact_match"] == scores[-1][1] == 1
    for step, score in scores:
        record = json.loads((run / "answers" / f"step-{step}.json").read_text())
        assert record["exact_match"] == score
        assert [sample["prompt"] for sample in record["samples"]] == [f"Number {i}?" for i in range(3)]


def test_questions_are_read_before_the_run_starts(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    asked = [f"eval.exact_match={tmp_path / 'rows.jsonl'}", "eval.pattern=####"]
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1: its answer, .* choose another pattern"):
        finetune.run(load_config(file, asked))
    assert not (tmp_path / "runs").exists()


def test_eval_of_a_run_finds_what_was_learnt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = trained / "runs" / "tiny", trained / "rows.jsonl"
    wrong = trained / "wrong.jsonl"
    wrong.write_text(rows.read_text() + json.dumps({"prompt": "Number 2?", "completion": "#### 7"}) + "\n")
    common = ["--task", "exact-match", "--pattern", "####", "--max-new-tokens", "16"]
    assert halo_train("eval", str(run), "--data", str(wrong), *common) == 0
    out = capsys.readouterr().out
    assert "exact match 80.00% (standard error 17.89), 4 of 5" in out
    record = json.loads((run / "eval" / "wrong.json").read_text())
    assert record["exact_match"]["exact_match"] == 0.8
    last = record["exact_match"]["samples"][-1]
    assert (last["answer"], last["expected"], last["correct"]) == ("2", "7", False)

    assert (
        halo_train("eval", str(run / "export"), "--data", str(rows), "--output", str(trained / "o.json")) == 0
    )
    loss = json.loads((trained / "o.json").read_text())["loss"]
    assert loss["loss"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["valid_after"], rel=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "nothing to evaluate on; give --data"),
        (["{run}", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["{folder}", "--data", "{rows}"], "holds no model: neither config.json nor export/config.json"),
        (["{run}", "--data", "{rows}", "--format", "sharegpt"], "--format must be one of auto, "),
        (["{run}", "--data", "{rows}", "--rename", "question"], "--rename must have the form old=new"),
        (["{run}", "--data", "{rows}", "--task", "exact-match", "--pattern", "!!!"], "choose another pattern"),
        (["{run}", "--lm-eval", "gsm8k"], "pip install 'lm-eval[hf]"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    names = {"run": trained / "runs" / "tiny", "folder": trained, "rows": trained / "rows.jsonl"}
    assert halo_train("eval", *(argument.format(**names) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_lm_eval_gets_the_export(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def simple_evaluate(**arguments: object) -> dict[str, object]:
        asked.update(arguments)
        return {"results": {"gsm8k": {"exact_match,strict-match": 0.25, "alias": "gsm8k"}}}

    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate))
    run = trained / "runs" / "tiny"
    assert halo_train("eval", str(run), "--lm-eval", "gsm8k,mmlu", "--limit", "5", "--device", "cpu") == 0
    assert asked["tasks"] == ["gsm8k", "mmlu"]
    assert asked["model_args"] == {"pretrained": str(run / "export"), "dtype": "bfloat16"}
    assert (asked["limit"], asked["device"]) == (5, "cpu")
    assert "exact_match,strict-match 0.2500" in capsys.readouterr().out
