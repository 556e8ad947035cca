"""AdamW for bfloat16 weights and 8-bit moments against torch's own in float32; schedules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training_fixtures import metrics, run_in_two_parts

from halo_train.training import optim
from halo_train.training.checkpoint import CheckpointWriter, Progress, load_checkpoint
from halo_train.training.config import TrainSection
from halo_train.training.errors import UserError
from halo_train.training.optim import (
    StochasticAdamW,
    build_optimizer,
    learning_rate,
    round_stochastically,
    set_learning_rate,
)


def train_section(**fields: object) -> TrainSection:
    return TrainSection.model_validate({"steps": 100, "lr": 1e-3, **fields})


def test_rounding_takes_the_two_neighbours_and_is_right_on_average() -> None:
    torch.manual_seed(0)
    x = torch.tensor([1.0, 1.001, -3.3, 1e-30, 0.0, 65504.3])
    rounded = torch.stack([round_stochastically(x) for _ in range(20_000)])
    assert torch.equal(rounded.bfloat16().float(), rounded)
    step = 2.0 ** (x.abs().clamp(min=1e-38).log2().floor() - 7)  # between bfloat16 neighbours
    assert ((rounded - x).abs() < step).all()
    assert (rounded[:, [0, 4]] == x[[0, 4]]).all()  # what bfloat16 holds stays
    # Five standard deviations of a mean of 20000 values that are at most a step apart.
    error = (rounded.double().mean(0) - x.double()).abs()
    assert (error <= 5 * 0.5 * step / 20_000**0.5).all()


def test_rounding_keeps_infinities() -> None:
    x = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(x), x)


def _train(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).add_(0.3).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("elements_at_a_time", [5, 1 << 26])
def test_float32_weights_are_updated_as_by_torch(
    monkeypatch: pytest.MonkeyPatch, elements_at_a_time: int
) -> None:
    monkeypatch.setattr(optim, "_SLICE", elements_at_a_time)
    start = torch.randn(3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    _train(StochasticAdamW([ours], lr=1e-2, weight_decay=0.1), ours, 20)
    _train(torch.optim.AdamW([theirs], lr=1e-2, betas=optim.BETAS, weight_decay=0.1), theirs, 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    """200 updates of 1e-5 each on weights of 1, where neighbours are 1/128 apart: to nearest, nothing would ever move."""
    torch.manual_seed(0)
    exact, rounded = (
        nn.Parameter(torch.ones(4096, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    nearest = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    _train(StochasticAdamW([exact], lr=1e-5), exact, 200)
    _train(StochasticAdamW([rounded], lr=1e-5), rounded, 200)
    _train(torch.optim.AdamW([nearest], lr=1e-5, weight_decay=0.0), nearest, 200)
    moved = 1 - exact.mean().item()
    assert moved > 3e-4
    # The standard deviation of the mean is sqrt(moved / 128 / 4096), 3% of what moved.
    assert 1 - rounded.float().mean().item() == pytest.approx(moved, rel=0.15)
    assert (nearest == 1).all()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, 128, dtype=dtype), nn.LayerNorm(128)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_norms_and_biases_do_not_decay() -> None:
    net = Net()
    optimizer = build_optimizer(net, train_section(weight_decay=0.3))
    assert type(optimizer) is torch.optim.AdamW
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"up.weight": 0.3, "up.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0}
    assert {name: decay.get(id(p)) for name, p in net.named_parameters() if p.requires_grad} == expected
    assert len(decay) == 4
    assert isinstance(build_optimizer(Net(torch.bfloat16), train_section()), StochasticAdamW)


def test_moments_in_8_bits_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit needs torchao: pip install 'halo_train\[torchao\]'"):
        build_optimizer(Net(), train_section(optimizer="adamw_8bit"))


@pytest.mark.slow  # torchao compiles its update with the C++ compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_8_bits_follow_the_exact_ones_and_resume(dtype: torch.dtype, tmp_path: Path) -> None:
    def steps(net: Net, optimizer: torch.optim.Optimizer, lrs: list[float]) -> None:
        for lr in lrs:
            for p in net.parameters():
                if p.requires_grad:
                    p.grad = torch.sin(torch.arange(p.numel()).view(p.shape) * 0.7 + lr * 1e4).to(p.dtype)
            set_learning_rate(optimizer, lr)
            optimizer.step()

    lrs = [1e-3, 2e-3, 5e-4, 1e-4]
    nets = {}
    for name in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        nets[name] = Net(dtype)
        before = nets[name].up.weight.clone()
        optimizer = build_optimizer(nets[name], train_section(optimizer=name))
        steps(nets[name], optimizer, lrs)
    exact, rounded = (net.up.weight.float() - before.float() for net in nets.values())
    assert exact.abs().mean() > 1e-3
    close = 0.1 if dtype == torch.float32 else 0.3  # the weights themselves are rounded
    assert (exact - rounded).norm() < close * exact.norm()
    moment = optimizer.state[nets["adamw_8bit"].up.weight]["exp_avg"]
    assert moment.codes.dtype == torch.uint8

    with CheckpointWriter(tmp_path, keep=1, background=True) as writer:
        path = writer.save(nets["adamw_8bit"], optimizer, Progress(4, 4))
    steps(nets["adamw_8bit"], optimizer, lrs)
    torch.manual_seed(5)
    again = Net(dtype)
    again_optimizer = build_optimizer(again, train_section(optimizer="adamw_8bit"))
    load_checkpoint(path, again, again_optimizer)
    steps(again, again_optimizer, lrs)
    for (key, value), other in zip(
        again.state_dict().items(), nets["adamw_8bit"].state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 1.0, 0.5]), ("cosine", [0.5, 1.0, 1.0, 0.5]), ("constant", [0.5, 1.0, 1.0, 1.0])],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    train = train_section(lr=2.0, schedule=schedule, warmup_steps=2)
    assert [learning_rate(step, 6, train) / 2 for step in (1, 2, 3, 5)] == pytest.approx(expected)
    assert learning_rate(6, 6, train) > 0
    assert learning_rate(7, 6, train) == (2 if schedule == "constant" else 0)


def test_a_run_with_bfloat16_weights_learns_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["model.dtype=bfloat16", "train.schedule=constant"]
    whole, parts = (metrics(run) for run in run_in_two_parts(tmp_path, overrides, monkeypatch))
    valid = [line["valid_loss"] for line in whole if "valid_loss" in line]
    assert valid[-1] < valid[0] - 0.5
    assert whole == parts
