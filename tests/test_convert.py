"""convert_to_halo_training() and revert(): what is converted, what is skipped and why, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from halo_train import HaloLinear, convert, convert_to_halo_training, revert
from halo_train.cost import Rates


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.up = nn.Linear(32, 64)
        self.gate = nn.Linear(32, 4)
        self.down = nn.Linear(64, 32)
        self.again = self.down
        self.lm_head = nn.Linear(32, 50, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        return self.lm_head(self.again(torch.relu(self.up(h))) + h)


def reasons(report):
    return {s.name: s.reason for s in report.skipped}


def test_report_lists_every_matrix_once():
    model = Toy()
    report = convert_to_halo_training(model, recipe="int8")
    assert [(c.name, c.shape, c.recipe) for c in report.converted] == [
        ("up", (64, 32), "int8"),
        ("down", (32, 64), "int8"),
    ]
    why = reasons(report)
    assert set(why) == {"embed", "gate", "lm_head"}
    assert "embedding" in why["embed"]
    assert "fewer than 16" in why["gate"]
    assert "output layer" in why["lm_head"]
    assert json.loads(json.dumps(report.to_dict()))["converted"][0]["name"] == "up"
    assert "2 linear layers run int8; 3 modules left alone" in str(report)
    assert "lm_head" in str(report)


def test_a_module_that_hangs_in_two_places_is_one_layer():
    model = Toy()
    convert_to_halo_training(model)
    assert isinstance(model.down, HaloLinear)
    assert model.again is model.down
    revert(model)
    assert model.again is model.down
    assert type(model.down) is nn.Linear


def test_parameters_are_shared_and_revert_restores():
    model = Toy()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_to_halo_training(model)
    assert all(after is before[name] for name, after in model.named_parameters())
    model(torch.randint(0, 50, (4, 8))).square().mean().backward()
    optimizer.step()
    assert revert(model) is model
    assert not any(isinstance(m, HaloLinear) for m in model.modules())
    assert all(after is before[name] for name, after in model.named_parameters())


def test_module_filter_replaces_the_default_choice():
    asked = []
    model = Toy()

    def keep(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name == "lm_head"

    report = convert_to_halo_training(model, module_filter_fn=keep)
    assert asked == ["up", "gate", "down", "lm_head"]
    assert [c.name for c in report.converted] == ["lm_head"]
    assert reasons(report)["up"] == "module_filter_fn returned False"


def test_tied_output_layer_is_skipped_whatever_its_name():
    model = Toy()
    model.to_logits = nn.Linear(32, 50, bias=False)
    model.to_logits.weight = model.embed.weight
    assert reasons(convert_to_halo_training(model))["to_logits"] == "weight tied to the embedding 'embed'"


def test_modules_that_would_bypass_the_layer_are_left_alone():
    attention = nn.MultiheadAttention(32, 4)
    patched = nn.Linear(32, 32)
    patched.forward = lambda x: x
    model = nn.ModuleDict({"attention": attention, "patched": patched, "good": nn.Linear(32, 32)})
    why = reasons(convert_to_halo_training(model))
    assert "subclass of nn.Linear" in why["attention.out_proj"]
    assert "not nn.Linear" in why["attention"]
    assert "overridden on the instance" in why["patched"]


def test_converting_twice_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(32, 32))
    convert_to_halo_training(model)
    with pytest.raises(ValueError, match=r"already converted \(recipe=fp8\); revert"):
        convert_to_halo_training(model, recipe="int8")


def test_revert_of_a_bare_layer_returns_its_linear():
    halo = HaloLinear(32, 32)
    assert revert(halo).weight is halo.weight


@pytest.mark.parametrize(
    ("module", "kwargs", "message"),
    [
        (
            nn.Sequential(nn.ReLU()),
            {},
            "must contain an nn.Linear; Sequential has no module with a matrix weight",
        ),
        (
            nn.Sequential(nn.Embedding(8, 32)),
            {},
            "(?s)no layer of Sequential is converted.*0: an embedding",
        ),
        (nn.Sequential(nn.Linear(32, 2)), {}, "(?s)nothing would run in low precision.*fewer than 16"),
        (nn.Linear(32, 32), {}, "HaloLinear.from_linear"),
        (nn.Sequential(nn.Linear(32, 32)), {"recipe": "fp-8"}, "did you mean 'fp8'"),
        (
            nn.Sequential(nn.Linear(32, 32)),
            {"module_filter_fn": lambda *_: False},
            "(?s)pass module_filter_fn.*returned False",
        ),
    ],
)
def test_refused(module, kwargs, message):
    with pytest.raises(ValueError, match=message):
        convert_to_halo_training(module, **kwargs)
    assert not any(isinstance(m, HaloLinear) for m in module.modules())


def test_not_a_module():
    with pytest.raises(TypeError, match=r"must be an nn\.Module; got dict"):
        convert_to_halo_training({})  # type: ignore[arg-type]


def test_layers_that_would_be_slower_are_left_alone(monkeypatch):
    host = 6.0 * 10 * 32 * 64
    rates = Rates(1.0, float8=2.0, int8=2.0, bandwidth=1e9, host_bf16=0.0, host_float8=host, host_int8=host)
    monkeypatch.setattr(convert, "measured_rates", lambda device: rates)
    # 8 bits are twice as fast, but the host needs as long as bf16 with 10 tokens; down, of the same size, likewise.
    report = convert_to_halo_training(Toy(), tokens=11)
    assert len(report.converted) == 2
    with pytest.raises(ValueError, match=r"0\.90 times the speed of bf16 with 9 tokens"):
        convert_to_halo_training(Toy(), tokens=9)
    assert len(convert_to_halo_training(Toy()).converted) == 2


def test_nothing_is_predicted_for_a_device_that_was_not_measured():
    assert len(convert_to_halo_training(Toy(), tokens=1).converted) == 2
