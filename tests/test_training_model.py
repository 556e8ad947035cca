import json
from pathlib import Path

import pytest
import torch
from training_fixtures import LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from halo_train import convert_to_halo_training, revert
from halo_train.training.errors import UserError
from halo_train.training.model import build_model, export_model, load_tokenizer, train_tokenizer

TEXT = "def f(x):\n    return x  + 1\n\tünïcödé 日本 , ok . don't"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(LLAMA))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, LLAMA["vocab_size"])


def test_any_text_round_trips(tokenizer) -> None:
    for text in (TEXT, "never seen: \x00\x7f 🙂", "  two  spaces ", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert len(tokenizer) <= LLAMA["vocab_size"]


def test_a_digit_is_a_token() -> None:
    tokenizer = train_tokenizer(["12345 + 12345 = 24690"] * 50, 300)
    digits = [token for token in tokenizer.tokenize("x = 12345") if token.isdigit()]
    assert digits == list("12345")


def test_training_a_tokenizer_is_reproducible() -> None:
    texts = [f"def function_{i}(argument): return argument * {i}" for i in range(200)]
    first, second = (train_tokenizer(texts, 600).get_vocab() for _ in range(2))
    assert first == second
    assert len(first) > 270  # it merged something


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"vocab_size in model\.path must be at least 258 .*; got 200"):
        train_tokenizer([TEXT], 200)


def test_random_weights_depend_on_the_seed_and_are_float32(config_file: Path, tokenizer) -> None:
    first, same, other = (build_model(config_file, tokenizer, seed, 64).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert {value.dtype for value in first.values()} == {torch.float32}


def test_the_export_is_an_ordinary_model_that_generates(config_file: Path, tokenizer, tmp_path: Path) -> None:
    model = build_model(config_file, tokenizer, 0, 64)
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    convert_to_halo_training(model, recipe="int8")
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    export_model(revert(model), tokenizer, tmp_path / "export")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in trained.items()
    }
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.items())
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"]) == TEXT
    out = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 5
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "export" / "model.safetensors").is_file()
    # A second export replaces the first, and no temporary folder stays.
    export_model(loaded, again, tmp_path / "export")
    assert {path.name for path in tmp_path.iterdir()} == {"export", "llama.json"}


def test_a_directory_is_loaded_with_its_own_tokenizer(config_file: Path, tokenizer, tmp_path: Path) -> None:
    model = build_model(config_file, tokenizer, 0, 64)
    export_model(model.to(torch.bfloat16), tokenizer, tmp_path / "hf")
    loaded_tokenizer = load_tokenizer(tmp_path / "hf", iter(()), tmp_path / "unused")
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    loaded = build_model(tmp_path / "hf", loaded_tokenizer, 5, 64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # master weights
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_an_empty_tokenizer_is_refused(config_file: Path, tokenizer, tmp_path: Path) -> None:
    """What transformers makes of a directory whose tokenizer was not copied along."""
    build_model(config_file, tokenizer, 0, 64).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"hf has no .*tokenizer"):
        load_tokenizer(tmp_path / "hf", iter(()), tmp_path / "unused")
    Qwen2Tokenizer().save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"no vocabulary for its tokenizer; copy tokenizer\.json"):
        load_tokenizer(tmp_path / "hf", iter(()), tmp_path / "unused")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'must be a JSON object with a "model_type"'),
        ("{}", 'must be a JSON object with a "model_type"'),
        ('{"model_type": "lama"}', "transformers cannot read .*lama"),
        ('{"model_type": "vit"}', "cannot load a causal language model"),
        (json.dumps(LLAMA | {"vocab_size": 8}), "the model's embedding only 8"),
    ],
)
def test_a_config_file_that_is_none(tmp_path: Path, tokenizer, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        build_model(path, tokenizer, 0, 64)


def test_a_missing_path_and_an_empty_directory(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(
        UserError, match="none does not exist; give a Hugging Face model directory or a config"
    ):
        build_model(tmp_path / "none", tokenizer, 0, 64)
    with pytest.raises(UserError, match="cannot load a causal language model"):
        build_model(tmp_path, tokenizer, 0, 64)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path, iter(()), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_directory_in_bfloat16(tokenizer, tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "tied.json"
    path.write_text(json.dumps(LLAMA | {"tie_word_embeddings": tied}))
    model = build_model(path, tokenizer, 0, 64)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    loaded = build_model(tmp_path / "hf", tokenizer, 0, 64, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16()), name


def test_random_weights_are_made_where_they_are_wanted(config_file: Path, tokenizer) -> None:
    model = build_model(config_file, tokenizer, 0, 64, torch.bfloat16, "meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
