"""The whole program in recipes/finetune.py on a tiny model: what a run leaves, and that stopping it loses nothing."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import LLAMA, metrics, run_in_two_parts, stop_after, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from halo_train import HaloLinear
from halo_train.recipes import finetune
from halo_train.training.checkpoint import latest_checkpoint
from halo_train.training.config import load_config
from halo_train.training.errors import Interrupted, RunFailed, UserError
from halo_train.training.loss import TokenLoss
from halo_train.training.run_folder import check_run_folder, make_run_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    finetune.run(load_config(write_run(folder)))
    return folder / "runs" / "tiny"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def _steps_saved(run: Path) -> int:
    last = latest_checkpoint(run / "checkpoints")
    return int(last.name.removeprefix("step-")) if last else 0


def test_a_run_leaves_everything_promised(finished: Path) -> None:
    files = {
        "config.yaml",
        "env.json",
        "conversion.json",
        "metrics.jsonl",
        "loss.png",
        "summary.json",
        "data.json",
    }
    folders = {"checkpoints", "export", "tokenizer"}
    assert {path.name for path in finished.iterdir()} == files | folders
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(finished / "config.yaml") == load_config(finished.parent.parent / "tiny.yaml")

    lines = metrics(finished)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 3, 6]
    assert all(0.5 < line["share_8bit"] < 1 for line in lines if "loss" in line)
    conversion = json.loads((finished / "conversion.json").read_text())
    assert len(conversion["converted"]) == 14
    assert {entry["name"] for entry in conversion["skipped"]} == {"model.embed_tokens", "lm_head"}
    environment = json.loads((finished / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ or environment["packages"]["torch"]
    assert environment["kernels"].keys() >= {"loaded", "reason", "ops"}


def test_the_summary_says_what_came_of_it(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["recipe"] == "fp8"
    assert summary["emulated_on_cpu"] is True
    assert summary["valid_after"] < summary["valid_before"] - 0.5
    assert (summary["layers_converted"], summary["layers_left_alone"]) == (14, 2)
    assert len(summary["errors"]) == 14
    for layer, products in summary["errors"].items():
        for product, error in products.items():
            assert 15 < error["sqnr_db"] < 45, (layer, product)


def test_the_export_loads_and_generates(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    prompt = tokenizer("def f3(x): return x + 3\n", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    # The weights are the trained ones: they give the validation loss that the run printed, but for 8-bit rounding.
    config = load_config(finished / "config.yaml")
    data = finetune.load_data(config, finished)
    loss = finetune.evaluate(TokenLoss(model), data.valid, torch.device("cpu"))
    assert loss == pytest.approx(json.loads((finished / "summary.json").read_text())["valid_after"], abs=0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    file = write_run(tmp_path)
    run = tmp_path / "runs" / "tiny"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, number)
        with pytest.raises(
            Interrupted, match=r"stopped after step 3 of 6; repeat the command to go on"
        ) as stopped:
            finetune.run(load_config(file))
    assert stopped.value.exit_code == code
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert signal.getsignal(signal.SIGINT) is handler  # the run put it back

    finetune.run(load_config(file))
    assert metrics(run) == metrics(finished)
    expected = _weights(finished)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(run).items())


def test_resuming_drops_the_steps_after_the_checkpoint_and_a_torn_line(
    finished: Path, tmp_path: Path
) -> None:
    file = write_run(tmp_path)
    run = tmp_path / "runs" / "tiny"
    finetune.run(load_config(file))
    # As after a kill in step 5, in the middle of writing its line.
    (run / "checkpoints" / "step-6").rename(tmp_path / "gone")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (run / "metrics.jsonl").write_text("\n".join([*kept, '{"step": 6, "lo']))
    finetune.run(load_config(file))
    assert metrics(run) == metrics(finished)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = metrics(finished), _weights(finished)
    finetune.run(load_config(finished / "config.yaml"))
    assert metrics(finished) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in _weights(finished).items())


def test_a_run_directory_is_protected(finished: Path, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    base = [f"run.dir={finished.parent}", "run.resume=never"]
    with pytest.raises(
        UserError, match=r"exists; go on with run\.resume=auto, .*run\.overwrite=true, .*run\.name"
    ):
        finetune.run(load_config(file, base))
    with pytest.raises(
        UserError,
        match=r"started with other settings: .*use the same value .*another run\.name .*run\.overwrite=true",
    ):
        finetune.run(load_config(finished / "config.yaml", ["train.lr=1e-3"]))
    foreign = tmp_path / "runs" / "tiny"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no run of halo_train"):
        finetune.run(load_config(file, ["run.overwrite=true"]))
    assert (foreign / "thesis.tex").exists()


def test_a_start_that_failed_leaves_no_directory_in_the_way(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows + '{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 25: the field 'completion' is missing"):
        finetune.run(load_config(file))
    assert not (tmp_path / "runs").exists()


def test_a_start_that_ended_within_its_first_file_is_repeated(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    folder = check_run_folder(config)
    folder.mkdir(parents=True)
    (folder / ".config.yaml.tmp").write_text("run:\n  na")
    assert check_run_folder(config) == folder
    make_run_folder(folder, config)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "checkpoints"}
    assert load_config(folder / "config.yaml") == config
    assert check_run_folder(config) == folder


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    finetune.run(load_config(file, ["train.steps=2"]))
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("Add 3", "Add 4"))
    with pytest.raises(
        UserError, match=r"started with other tokens of data\.train and data\.valid.*put it back"
    ):
        finetune.run(load_config(file, ["train.steps=2"]))
    # Written again, with another time but the same rows, it is the same data.
    (tmp_path / "rows.jsonl").write_text(rows)
    finetune.run(load_config(file, ["train.steps=2"]))


def test_overwriting_starts_from_nothing(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    finetune.run(load_config(file, ["train.steps=4"]))
    finetune.run(load_config(file, ["train.steps=2", "run.overwrite=true"]))
    run = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    exact = TokenLoss.forward

    def spoiled(self: TokenLoss, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        return exact(self, ids, labels) * (math.nan if calls == 6 else 1)  # two micro-batches a step

    monkeypatch.setattr(TokenLoss, "forward", spoiled)
    with pytest.raises(RunFailed, match=r"step 3: loss nan, .*not updated.*step-2, is kept; lower train\.lr"):
        finetune.run(load_config(write_run(tmp_path)))
    run = tmp_path / "runs" / "tiny"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2]


OTHER_FAMILIES: dict[str, dict[str, object]] = {
    "biases, tied embeddings": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "fused projection, dropout": {
        "model_type": "gpt_neox",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.1,
    },
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_train_resume_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    whole, run = run_in_two_parts(tmp_path, [], monkeypatch, model=OTHER_FAMILIES[family])
    assert metrics(run) == metrics(whole)
    valid = [line["valid_loss"] for line in metrics(run) if "valid_loss" in line]
    assert valid[-1] < valid[0] - 0.3
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert exported.config.tie_word_embeddings == OTHER_FAMILIES[family].get("tie_word_embeddings", False)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    gpt2: dict[str, object] = {
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
    }
    with pytest.raises(
        UserError, match=r"(?s)quant\.recipe=fp8 cannot be applied to .*Conv1D is not nn\.Linear"
    ):
        finetune.run(load_config(write_run(tmp_path, model=gpt2)))


def test_longer_rows_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"seq_len must be at most the model's max_position_embeddings=64; got 65"
    ):
        finetune.run(load_config(write_run(tmp_path), ["data.seq_len=65"]))


def test_a_device_that_cannot_run_the_recipe_ends_the_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernels(*_: object) -> None:
        raise RuntimeError("its kernel is not available: no nvcc")

    monkeypatch.setattr(HaloLinear, "forward", no_kernels)
    with pytest.raises(
        UserError, match=r"quant\.recipe=fp8 does not run on cpu: its kernel is not available"
    ):
        finetune.run(load_config(write_run(tmp_path)))
    assert not (tmp_path / "runs").exists()


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """The mean is over the trained tokens of the step; a mean of means would weigh the batch of short rows too much."""
    # Letters in random order, which the tokenizer cannot merge into a few tokens.
    letters = random.Random(0)
    lengths = [1, 40] * 5
    rows = [
        {"prompt": "a", "completion": "".join(letters.choices("bcdefghi", k=length))} for length in lengths
    ]
    losses = {}
    for accumulate in (1, 2):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        file = write_run(folder)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes = [f"train.micro_batch={8 // accumulate}", f"train.grad_accum={accumulate}"]
        finetune.run(load_config(file, [*sizes, "train.steps=4", "quant.recipe=bf16"]))
        losses[accumulate] = [line["loss"] for line in metrics(folder / "runs" / "tiny") if "loss" in line]
    # Apart by rounding, 3e-5; a mean of means is 2% off at the last step.
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_a_step_waits_for_the_device_once_and_in_each_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a tensor's value is what waits; on a CPU it is counted. transformers reads one in the mask of every forward."""
    read = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal read
            read += op is torch.ops.aten._local_scalar_dense.default
            return op(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist

    def counted(self: torch.Tensor) -> list[float]:
        nonlocal read
        read += 1
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    reads = {}
    for steps in (1, 6):
        read = 0
        overrides = [f"train.steps={steps}", f"run.name={steps}", "save.every=9", "log.eval_every=9"]
        with Count():
            finetune.run(load_config(write_run(tmp_path), overrides))
        reads[steps] = read
    assert reads[6] - reads[1] == 5 * (1 + 2)  # two micro-batches a step


def test_wandb_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'halo_train\[wandb\]'"):
        finetune.run(load_config(write_run(tmp_path), ["log.wandb=true"]))


def test_tensorboard_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'halo_train\[tensorboard\]'"):
        finetune.run(load_config(write_run(tmp_path), ["log.tensorboard=true"]))


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across a resume, too: of the step that is repeated it shows one value."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    overrides = ["log.tensorboard=true", "log.quant_every=3"]
    for run in run_in_two_parts(tmp_path, overrides, monkeypatch):
        events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        for key in ("loss", "grad_norm", "share_8bit", "valid_loss"):
            lines = [line for line in metrics(run) if key in line and line["step"]]
            shown = events.Scalars(key)
            assert [event.step for event in shown] == [line["step"] for line in lines]
            assert [event.value for event in shown] == pytest.approx([line[key] for line in lines])
        assert any(tag.startswith("quant_fprop/") for tag in events.Tags()["scalars"])


def test_wandb_gets_every_step_and_never_asks_for_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, set[str]]] = []
    ended: list[int] = []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, set(values)))

        def finish(self, exit_code: int) -> None:
            ended.append(exit_code)

    def init(**arguments: object) -> FakeRun:
        assert os.environ["WANDB_MODE"] == "offline"
        assert arguments["name"] == "tiny-fp8"
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "to be restored afterwards")
    monkeypatch.delenv("WANDB_MODE")
    finetune.run(load_config(write_run(tmp_path), ["log.wandb=true", "train.steps=2"]))
    assert [step for step, _ in logged] == [1, 2, 2]
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= logged[0][1]
    assert logged[-1][1] == {"valid_loss"}
    assert ended == [0]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    overrides = ["train.steps=100", "save.every=1", "train.grad_accum=1"]  # much of the time goes into saving
    configs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        configs.append(
            load_config(write_run(tmp_path / name, model=LLAMA | {"num_hidden_layers": 1}), overrides)
        )
    whole, killed = (config.run.dir / "tiny" for config in configs)
    in_background = configs[1].model_copy(
        update={"save": configs[1].save.model_copy(update={"background": True})}
    )
    # A server that has imported everything and forks: a start takes a fraction of a second instead of several.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["halo_train.recipes.finetune"])
    moments = random.Random(0)
    for kill in range(20):
        before = _steps_saved(killed)
        child = context.Process(target=finetune.run, args=(in_background if kill % 4 > 1 else configs[1],))
        child.start()
        if kill % 2:
            time.sleep(moments.uniform(0, 1))  # while it starts, loads or runs
        else:
            while _steps_saved(killed) == before:
                assert child.is_alive()
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert _steps_saved(killed) >= before
    assert 10 <= _steps_saved(killed) < 100
    for config in configs:
        finetune.run(config)
    assert metrics(killed) == metrics(whole)
    expected = _weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(killed).items())
