from pathlib import Path
from typing import get_args

import pytest
import yaml
from training_fixtures import write_run

from halo_train.training.config import DataSection, first_difference, load_config
from halo_train.training.errors import UserError
from halo_train.training.formats import AUTO, FORMATS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.leraning_rate=1", "train.leraning_rate: unknown key; train has steps, epochs, micro_batch"),
        ("data.valid_part=1", "data.valid_part: unknown key; did you mean 'data.valid'?"),
        ("model.dtype=bf16", "model.dtype: should be 'float32' or 'bfloat16'; got 'bf16'"),
        ("train.step=1", "train.step: unknown key; did you mean 'train.steps'?"),
        ("lr=1", "lr: unknown key; did you mean 'train.lr'?"),
        ("data.lr=1", "data.lr: unknown key; did you mean 'train.lr'?"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("quant.recompute=gate", "quant.recompute.*'nothing', 'inputs' or 'mlp'.*got 'gate'"),
        ("quant.recipe=fp9", "quant.recipe: must be one of fp8, int8.*did you mean 'fp8'.*got 'fp9'"),
        ("train.steps=0", "train.steps: should be greater than 0; got '0'"),
        ("train.lr=fast", "train.lr: should be a valid number.*got 'fast'"),
        ("train.lr=nan", "train.lr: .*finite"),
        ("train.warmup_steps=6", "warmup_steps must be less than steps=6; got 6"),
        ("train.epochs=2", "train: steps=6 and epochs=2 exclude each other; .* train.steps=null"),
        ("train.steps=null", "train: steps or epochs is required, but neither is given"),
        ("train.epochs=0.5", "train.epochs: should be a valid integer"),
        ("data.format=chat", "data.format: should be 'auto', 'messages', .*; got 'chat'"),
        ("train.schedule=step", "train.schedule: should be 'cosine', 'linear' or 'constant'; got 'step'"),
        ("run.name=../x", "run.name: .*pattern.*got '../x'"),
        ("train=5", "train: .*got '5'"),
        ("train.steps", "must have the form section.key=value; got 'train.steps'"),
        ("train.steps.x=1", "train.steps: .*got {'x': '1'}"),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(file, [override])


def test_recomputing_twice_is_refused(file: Path) -> None:
    both = ["quant.recompute=mlp", "train.activation_checkpointing=full"]
    with pytest.raises(
        UserError, match=r"[^:]: quant\.recompute=mlp and .*checkpointing=full would both recompute"
    ):
        load_config(file, both)
    assert load_config(file, both[:1]).quant.recompute == "mlp"
    load_config(file, ["quant.recompute=nothing", both[1]])


def test_all_faults_come_in_one_message(file: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config(file, ["train.steps=0", "quant.recipe=fp9", "save.evry=1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(str(file))
    assert "save.evry: unknown key; did you mean 'save.every'?" in lines[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "is not YAML"),
        ("", "it holds nothing"),
        ("- a", "it holds list"),
        ("run: {name: x}", "model: required, but not given"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_missing_file_points_to_ls(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml does not exist; `halo-train ls`"):
        load_config(tmp_path / "nothing.yaml")


def test_values_keep_their_types(file: Path) -> None:
    config = load_config(file, ["train.lr=3e-4", "run.overwrite=true", "data.valid=null", "run.name=2024"])
    assert config.train.lr == 3e-4
    assert config.run.overwrite is True
    assert config.data.valid is None
    assert config.run.name == "2024"


def test_the_formats_are_those_that_can_be_read() -> None:
    assert set(get_args(DataSection.model_fields["format"].annotation)) == {AUTO, *FORMATS}


def test_paths_start_at_the_file_and_in_overrides_at_the_current_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(file, ["data.train=mine.jsonl"])
    assert config.model.path == str(file.parent / "model.json")
    assert config.data.train == str(elsewhere / "mine.jsonl")
    assert load_config(file, ["data.train=stdlib"]).data.train == "stdlib"


def test_the_resolved_file_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["train.lr=1e-3"])
    again = tmp_path / "resolved.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    # Every field is there, so the file documents the run even when a default changes.
    assert set(yaml.safe_load(again.read_text())["train"]) == set(type(config.train).model_fields)


def test_first_difference_looks_at_what_changes_the_steps(file: Path) -> None:
    base = load_config(file)
    assert (
        first_difference(base, load_config(file, ["log.every=1", "save.keep=5", "train.device=cpu"])) is None
    )
    assert first_difference(base, load_config(file, ["train.lr=1e-3"])) == "train.lr was 0.01, now 0.001"
    assert first_difference(base, load_config(file, ["run.seed=1"])) == "run.seed was 0, now 1"
    assert (
        first_difference(base, load_config(file, ["quant.recipe=int8"])) == "quant.recipe was fp8, now int8"
    )
