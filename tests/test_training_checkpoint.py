import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halo_train import convert_to_halo_training, equalizer_state_dict
from halo_train.training import checkpoint as module
from halo_train.training.checkpoint import CheckpointWriter, Progress, latest_checkpoint, load_checkpoint
from halo_train.training.errors import RunFailed, UserError


class Tied(nn.Module):
    """Embedding and output layer share a weight, as in many small language models."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.up(self.embed(ids)), 0.1, self.training)
        return self.head(self.down(hidden))


def _setup(seed: int = 0, width: int = 32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied(width)
    convert_to_halo_training(model, recipe="fp8")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> list[float]:
    losses = []
    for i in batches:
        ids = torch.arange(8) * (i + 1) % 16
        loss = torch.nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> Path:
    with CheckpointWriter(folder, keep) as writer:
        return writer.save(model, optimizer, progress)


@pytest.mark.parametrize("background", [False, True])
def test_training_continues_bit_for_bit(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _setup()
    _steps(model, optimizer, range(4))
    trained = threading.Event()
    with monkeypatch.context() as patch, CheckpointWriter(tmp_path, 2, background=background) as writer:
        if background:
            patch.setattr(module.dcp, "save", after(trained, module.dcp.save))
        path = writer.save(model, optimizer, Progress(4, 8))
        assert path.exists() is not background
        expected = _steps(model, optimizer, range(4, 8))  # with dropout, so the random state counts
        trained.set()

    again, again_optimizer = _setup(seed=1)
    assert load_checkpoint(path, again, again_optimizer) == Progress(4, 8)
    assert equalizer_state_dict(again).keys() == {"up", "down"}
    assert _steps(again, again_optimizer, range(4, 8)) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for name, value in equalizer_state_dict(model).items():
        assert torch.equal(equalizer_state_dict(again)[name], value), name


def after(event: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert event.wait(30)
        return function(*args, **kwargs)

    return waiting


def test_at_most_one_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _setup()
    running: list[int] = []
    save = module.dcp.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        running.append(1)
        time.sleep(0.05)
        assert len(running) == 1
        out = save(*args, **kwargs)
        running.pop()
        return out

    monkeypatch.setattr(module.dcp, "save", slow)
    with CheckpointWriter(tmp_path, keep=1, background=True) as writer:
        for step in (1, 2, 3):
            writer.save(model, optimizer, Progress(step, step))
            before = latest_checkpoint(tmp_path)
            assert before is None if step == 1 else before == tmp_path / f"step-{step - 1}"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_checkpoint_before_the_first_batch_has_no_equaliser(tmp_path: Path) -> None:
    model, optimizer = _setup()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(0, 0), keep=2)
    again, again_optimizer = _setup(seed=1)
    load_checkpoint(path, again, again_optimizer)
    assert equalizer_state_dict(again) == {}
    assert _steps(again, again_optimizer, range(3)) == _steps(*_reload(path), range(3))


def _reload(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = _setup(seed=2)
    load_checkpoint(path, model, optimizer)
    return model, optimizer


def test_the_newest_are_kept_and_found_by_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    model, optimizer = _setup()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, Progress(step, step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-11"
    (tmp_path / "step-99.old").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-11"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model, optimizer = _setup()
    save_checkpoint(tmp_path, model, optimizer, Progress(1, 1), keep=1)
    with (
        full_disk(),
        pytest.raises(
            RunFailed, match=r"step-2 could not be written: .*last complete one is .*step-1; free disk"
        ),
    ):
        save_checkpoint(tmp_path, model, optimizer, Progress(2, 2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    load_checkpoint(tmp_path / "step-1", *_setup(seed=1))


@contextmanager
def full_disk() -> Iterator[None]:
    """Writes beyond 4 KiB fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _ends_with_its_own_error(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    try:
        with CheckpointWriter(folder, keep=1, background=True) as writer:
            writer.save(model, optimizer, Progress(2, 2))
            raise ZeroDivisionError
    except ZeroDivisionError:
        return True


def test_what_fails_in_the_background_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = _setup()
    message = r"step-2 could not be written: .*last complete one is .*step-1; free disk"
    with CheckpointWriter(tmp_path, keep=1, background=True) as writer:
        writer.save(model, optimizer, Progress(1, 1))
        writer.wait()
        with full_disk():  # at a later step
            writer.save(model, optimizer, Progress(2, 2))
            while not writer.failed:
                time.sleep(0.01)
        with pytest.raises(RunFailed, match=message):
            writer.wait()
        assert not writer.failed
        writer.wait()
        with full_disk():  # when the next one is saved
            writer.save(model, optimizer, Progress(2, 2))
            with pytest.raises(RunFailed, match=message):
                writer.save(model, optimizer, Progress(3, 3))
    with full_disk():
        with (
            pytest.raises(RunFailed, match=message),
            CheckpointWriter(tmp_path, 1, background=True) as writer,
        ):
            writer.save(model, optimizer, Progress(2, 2))  # at the end
        assert _ends_with_its_own_error(tmp_path, model, optimizer)
    assert "step-2 could not be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    load_checkpoint(tmp_path / "step-1", *_setup(seed=1))


KILLED_WHILE_SAVING = f"""
import os, signal, sys, time
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_checkpoint import _setup, _steps, CheckpointWriter, Progress
folder, where, background = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
model, optimizer = _setup()
_steps(model, optimizer, range(1))
writer = CheckpointWriter(folder, keep=1, background=background)
writer.save(model, optimizer, Progress(1, 1))
writer.wait()
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if where == "before the metadata":
    FileSystemWriter.finish = kill
else:
    os.rename = kill
_steps(model, optimizer, range(1, 2))
writer.save(model, optimizer, Progress(2, 2))
while True:  # the training goes on
    _steps(model, optimizer, range(2, 3))
"""


@pytest.mark.parametrize(
    ("where", "background"), [("before the metadata", True), ("before the rename", False)]
)
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path, where: str, background: bool) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), where, str(background)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", ".unfinished-step-2"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1"

    model, optimizer = _setup(seed=1)
    progress = load_checkpoint(tmp_path / "step-1", model, optimizer)
    _steps(model, optimizer, range(1, 2))
    save_checkpoint(tmp_path, model, optimizer, Progress(progress.step + 1, 2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]  # the leftover is gone, too


def test_the_old_checkpoint_goes_only_after_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _setup()
    save_checkpoint(tmp_path, model, optimizer, Progress(1, 1), keep=1)
    seen: list[set[str]] = []
    rmtree = module.shutil.rmtree

    def watch(path: Path, *args: object, **kwargs: object) -> None:
        seen.append({entry.name for entry in tmp_path.iterdir()})
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(module.shutil, "rmtree", watch)
    save_checkpoint(tmp_path, model, optimizer, Progress(2, 2), keep=1)
    assert seen == [{"step-1", "step-2"}]


def test_another_model_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model, optimizer = _setup()
    path = save_checkpoint(tmp_path, model, optimizer, Progress(1, 1), keep=1)
    with pytest.raises(UserError, match=r"step-1 cannot be loaded: .*run\.overwrite=true"):
        load_checkpoint(path, *_setup(width=48))
    (path / ".metadata").unlink()
    with pytest.raises(UserError, match=r"step-1 cannot be loaded: .*delete it to go on from the one before"):
        load_checkpoint(path, *_setup())


def test_an_unwritable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(RunFailed, match="No space left on device; there is no earlier one"):
        save_checkpoint(tmp_path, *_setup(), Progress(1, 1), keep=1)
    assert not list(tmp_path.iterdir())
