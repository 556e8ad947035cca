import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_fixtures import halo_train, metrics, write_run

from halo_train import RECIPES
from halo_train.recipes import finetune
from halo_train.training import doctor
from halo_train.training.config import Config, load_config
from halo_train.training.errors import Interrupted


def test_run_ends_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = halo_train("run", str(write_run(tmp_path)), "train.steps=2", "quant.recipe=int8")
    out = capsys.readouterr().out
    assert code == 0
    assert [line["step"] for line in metrics(tmp_path / "runs" / "tiny") if "loss" in line] == [1, 2]
    assert "validation loss: " in out
    table = out[out.index("validation, before") :]
    for row in (
        "validation, after",
        "fprop / dgrad / wgrad",
        "model.layers.",
        " 1.mlp.down_proj ",
        "tokens/s",
        "time waiting for data",
    ):
        assert row in table
    assert "tokens/s say nothing about" in " ".join(table.split())
    assert "Failed to load" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "config file none.yaml does not exist; `halo-train ls`"),
        (["run", "{file}", "train.step=1"], "train.step: unknown key; did you mean 'train.steps'?"),
        (["run", "{file}", "data.train=none.jsonl"], "none.jsonl does not exist; set data.train"),
        (["run", "{file}", "--nproc", "3"], "must be a multiple of 3; got 2"),
        (["compare", "{file}", "quant.recipe=bf16,fp8", "--nproc", "3"], "must be a multiple of 3; got 2"),
        (["run", "{file}", "model.path=none"], "none does not exist; give a Hugging Face model directory"),
        (["validate", "{file}", "data.train=none.jsonl"], "data.train: "),
        (["validate", "{file}", "quant.recipe=int9"], "did you mean 'int8'?"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = write_run(tmp_path)
    assert halo_train(*(argument.format(file=file) for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("halo-train: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
            ),
            "CUDA out of memory. Tried to allocate 2.00 GiB. Lower train.micro_batch",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "no space is left on the disk for a/b; "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space is left on the disk; "),
    ],
)
def test_what_is_full_is_one_message_and_code_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def full(config: Config) -> None:
        raise error

    monkeypatch.setattr(finetune, "run", full)
    assert halo_train("run", str(write_run(tmp_path))) == 1
    assert capsys.readouterr().err.startswith(f"halo-train: {message}")


def test_any_other_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: Config) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(finetune, "run", wrong)
    with pytest.raises(PermissionError):
        halo_train("run", str(write_run(tmp_path)))


def test_a_run_that_exists_is_refused_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_run(tmp_path))
    assert halo_train("run", file, "train.steps=2") == 0
    assert halo_train("run", file, "train.steps=2", "run.resume=never") == 2
    assert "run.resume=auto" in capsys.readouterr().err
    assert halo_train("run", file, "train.steps=2") == 0
    assert "resumed from" in capsys.readouterr().out


def test_a_signal_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: object) -> None:
        raise Interrupted(15, "stopped after step 3 of 6; repeat the command to go on")

    monkeypatch.setattr(finetune, "run", stopped)
    assert halo_train("run", str(write_run(tmp_path))) == 143
    assert "stopped after step 3 of 6" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(finetune, "run", broken)
    with pytest.raises(ZeroDivisionError):
        halo_train("run", str(write_run(tmp_path)))


def test_validate_prints_the_whole_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("validate", str(write_run(tmp_path)), "train.lr=5e-4") == 0
    out, err = capsys.readouterr()
    assert "lr: 0.0005" in out
    assert "schedule: cosine" in out
    assert "is valid" in err
    assert not (tmp_path / "runs").exists()


def test_every_shipped_file_is_listed_and_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("ls") == 0
    out = capsys.readouterr().out
    files = sorted(Path(finetune.__file__).parent.glob("*.yaml"))
    assert files
    for file in files:
        assert file.name in out
        # Of these files the user brings model and data.
        mine = [] if file.stem == "quickstart" else [f"model.path={file}", f"data.train={file}"]
        assert halo_train("validate", str(file), *mine) == 0
    for recipe in RECIPES:
        assert f"│ {recipe} " in out


def test_a_copied_run_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert halo_train("cp", "quickstart", "my.yaml") == 0
    assert capsys.readouterr().out.split() == ["my.yaml", "quickstart_llama.json"]
    assert load_config(Path("my.yaml")).model.path == str(tmp_path / "quickstart_llama.json")
    assert halo_train("validate", "my.yaml") == 0
    assert halo_train("cp", "quickstart.yaml", "second.yaml") == 0  # beside the model file of the first


def test_cp_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    Path("sub").mkdir()
    Path("sub", "quickstart_llama.json").write_text("{}")
    for arguments, message in (
        (["quickstart", "mine.yaml"], "mine.yaml exists and is not overwritten"),
        (["quickstart", "sub/x.yaml"], "sub/quickstart_llama.json exists and is not overwritten"),
        (["quickstart", "none/x.yaml"], "the folder none does not exist"),
        (["quickstrat", "x.yaml"], "did you mean 'quickstart'?; got 'quickstrat'"),
    ):
        assert halo_train("cp", *arguments) == 2
        assert message in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"
    assert sorted(str(path) for path in Path().rglob("*")) == [
        "mine.yaml",
        "sub",
        "sub/quickstart_llama.json",
    ]


def test_the_schema_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)
    assert set(schema["required"]) == {"run", "model", "data", "train"}
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_preprocess_shows_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("preprocess", str(write_run(tmp_path)), "run.seed=1", "--show", "2") == 0
    out = capsys.readouterr().out
    assert "format prompt_completion" in out
    assert "% of them trained" in out
    assert "data.seq_len=48" in out
    rows = re.findall(r"^def f(\d+)\(x\): return x \+ \1\n«Add \1 to x\.<\|endoftext\|>»$", out, re.MULTILINE)
    assert len(rows) == out.count("tokens trained") == 2
    assert not (tmp_path / "runs").exists()


def test_doctor_reports_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("doctor") == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    for recipe in RECIPES:
        assert f"recipe {recipe} " in out
    for op in ("hadamard", "quantize_rows"):
        assert f"{op} on a GPU" in out


def test_doctor_fails_when_a_result_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = doctor.hadamard_transform
    # Signs of one column: the kind of fault that a wrong kernel makes.
    monkeypatch.setattr(
        doctor, "hadamard_transform", lambda x: right(x) * (1 - 2 * (x.new_ones(1).cumsum(0) > 0))
    )
    assert halo_train("doctor") == 1
    out, err = capsys.readouterr()
    assert out.count("FAILED") == 2
    assert "2 of the self-tests failed" in err


def test_doctor_names_what_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(x: object) -> None:
        raise RuntimeError("its kernel is not available: no nvcc")

    monkeypatch.setattr(doctor, "hadamard_transform", refuse)
    assert halo_train("doctor") == 1
    assert "its kernel is not available: no nvcc" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["typer", "transformers", "pydantic"])
def test_without_the_extra_the_command_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import halo_train.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"halo-train: the package '{package}' is missing; the command needs the training extra: "
        "pip install 'halo_train[train]'"
    )
