import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from halo_train import convert_to_halo_training, equalizer_state_dict
from halo_train.training import checkpoint as module
from halo_train.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
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


def test_training_continues_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = _setup()
    _steps(model, optimizer, range(4))
    path = save_checkpoint(tmp_path, model, optimizer, Progress(4, 8), keep=2)
    expected = _steps(model, optimizer, range(4, 8))  # with dropout, so the random state counts

    again, again_optimizer = _setup(seed=1)
    assert load_checkpoint(path, again, again_optimizer) == Progress(4, 8)
    assert equalizer_state_dict(again).keys() == {"up", "down"}
    assert _steps(again, again_optimizer, range(4, 8)) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for name, value in equalizer_state_dict(model).items():
        assert torch.equal(equalizer_state_dict(again)[name], value), name


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
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writes beyond 4 KiB fail, as on a full disk
    try:
        with pytest.raises(
            RunFailed, match=r"step-2 could not be written: .*last complete one is .*step-1; free disk"
        ):
            save_checkpoint(tmp_path, model, optimizer, Progress(2, 2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    load_checkpoint(tmp_path / "step-1", *_setup(seed=1))


KILLED_WHILE_SAVING = f"""
import os, signal, sys
from pathlib import Path
from torch.distributed.checkpoint import FileSystemWriter
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_checkpoint import _setup, _steps, Progress, save_checkpoint
folder, where = Path(sys.argv[1]), sys.argv[2]
model, optimizer = _setup()
_steps(model, optimizer, range(1))
save_checkpoint(folder, model, optimizer, Progress(1, 1), keep=1)
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if where == "before the metadata":
    FileSystemWriter.finish = kill
else:
    os.rename = kill
_steps(model, optimizer, range(1, 2))
save_checkpoint(folder, model, optimizer, Progress(2, 2), keep=1)
"""


@pytest.mark.parametrize("where", ["before the metadata", "before the rename"])
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), where], capture_output=True, text=True
    )
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
