"""calibrate(): the choice by measured error and modelled time; recipe files; conversion by layer."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from halo_train import (
    RECIPES,
    HaloConfig,
    HaloLinear,
    calibrate,
    convert_to_halo_training,
    load_recipe,
    measure_products,
    revert,
)
from halo_train.calibrate import CANDIDATES, relative_time
from halo_train.recipe_file import save_recipe


class Net(nn.Module):
    """``easy`` sees Gaussian data, ``hot`` a few channels that are 300 times larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.easy, self.hot = nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = torch.ones(64)
        self.scale[:8] = 300

    def forward(self, x):
        return self.hot(torch.tanh(self.easy(x)) * self.scale)


def batches(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(count, 256, 64, generator=torch.Generator().manual_seed(1)))


def step(model, x):
    model(x).square().mean().backward()


def test_measures_what_the_layers_would_do():
    """Scores agree with measure_products on the same data, which multiplies by the real 8-bit path."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    (x,) = batches(1)
    result = calibrate(model, [x], step)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.grad is None for p in model.parameters())
    convert_to_halo_training(model, recipe="bf16")
    for name, config in CANDIDATES.items():
        errors = measure_products(model, lambda: step(model, x), recipe=config)
        for layer in result.layers:
            for product, error in errors[layer.name].items():
                assert layer.products[name][product] == pytest.approx(error.sqnr_db, abs=1.0)


def test_cheapest_that_is_good_enough():
    result = calibrate(Net(), batches(), step)
    for layer in result.layers:
        good = {name: layer.time[name] for name, score in layer.scores.items() if score >= result.target_db}
        assert layer.recipe == (min(good, key=good.get) if good else "bf16")
    # Of so small a layer the bytes decide, and fp8 reads gradients once.
    assert {layer.name: layer.recipe for layer in result.layers}["easy"] == "fp8_plain"


def test_a_target_out_of_reach_keeps_a_layer_in_bf16():
    easy, hot = calibrate(Net(), batches(), step, target_db=35).layers
    assert easy.recipe in ("int8", "int8_plain")  # e4m3 ends below 30 dB
    assert "int8_plain only" in hot.reason
    assert all(layer.recipe == "bf16" for layer in calibrate(Net(), batches(), step, target_db=90).layers)
    assert "no 8-bit recipe reaches 90 dB" in calibrate(Net(), batches(), step, target_db=90).layers[0].reason
    assert hot.name == "hot"


def test_time_counts_where_it_is_preferred():
    """Small layers spend more on rounding than 8-bit GEMMs save."""
    assert "prefer='time' (--prefer time) leaves those in bf16" in str(calibrate(Net(), batches(), step))
    found = calibrate(Net(), batches(), step, prefer="time")
    layers = found.layers
    assert all(layer.recipe == "bf16" for layer in layers)
    assert "prefer=" not in str(found)
    assert "no 8-bit recipe is faster; fp8_plain takes" in layers[0].reason
    with pytest.raises(ValueError, match="prefer must be one of memory, time; got 'speed'"):
        calibrate(Net(), batches(), step, prefer="speed")


def test_recipe_file_converts_the_model(tmp_path):
    path = tmp_path / "recipe.json"
    result = calibrate(Net(), batches(), step, target_db=35)
    result.save(path)
    assert load_recipe(path) == result.recipe
    model = Net()
    report = convert_to_halo_training(model, recipe=load_recipe(path))
    assert {layer.name: layer.recipe for layer in report.converted} == {
        name: config.name for name, config in result.recipe.items()
    }
    assert model.easy.config == result.recipe["easy"]
    evidence = json.loads(path.read_text())["evidence"]
    assert evidence["batches"] == 2
    assert evidence["layers"]["easy"]["scores"]["fp8"] == pytest.approx(
        result.layers[0].scores["fp8"], abs=1e-3
    )
    text = str(result)
    assert all(layer.name in text and layer.reason in text for layer in result.layers)


def test_hugging_face_batches():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )  # fmt: skip
    ids = torch.randint(0, 64, (4, 32))
    result = calibrate(model, [{"input_ids": ids, "labels": ids}])
    assert [layer.name for layer in result.layers][-1] == "model.layers.0.mlp.down_proj"
    assert len(result.layers) == 7
    assert all(math.isfinite(score) for layer in result.layers for score in layer.scores.values())


def test_patterns_choose_in_order():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    custom = dataclasses.replace(RECIPES["int8"], rotate_k=False)
    report = convert_to_halo_training(model, recipe={"a": "bf16", "[ab]": custom})
    assert (model["a"].config, model["b"].config) == (RECIPES["bf16"], custom)
    assert type(model["c"]) is nn.Linear
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("c", "no pattern of the recipe matches its name")
    ]
    revert(model)
    assert not any(isinstance(m, HaloLinear) for m in model.modules())


def test_custom_recipes_survive_the_file(tmp_path):
    recipes = {"*.down_proj": HaloConfig(format="int8", grad_format="int8", equalize=False), "*": "halo1_fp8"}
    save_recipe(tmp_path / "r.json", recipes, {})
    assert load_recipe(tmp_path / "r.json") == {
        "*.down_proj": recipes["*.down_proj"],
        "*": RECIPES["halo1_fp8"],
    }
    written = json.loads((tmp_path / "r.json").read_text())["recipe"]
    assert written["*"] == "halo1_fp8"
    assert written["*.down_proj"]["equalize"] is False


def test_modelled_time_is_that_of_the_gpu():
    """GEMMs and bytes at the rates of an H200 with 16384 tokens, whatever the host takes: 1.6 to 1.8 for `fp8` (measured: 1.68 to 1.77),
    more for `int8`."""
    for shape in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        fp8, plain, int8 = (1 / relative_time(RECIPES[name], shape) for name in ("fp8", "fp8_plain", "int8"))
        assert 1.6 < fp8 < 1.8
        assert fp8 < plain
        assert fp8 < int8 < 1.9
    assert relative_time(RECIPES["bf16"], (4096, 4096)) == 1


def test_refused(tmp_path):
    model = Net()
    with pytest.raises(ValueError, match="nothing was measured; batches must not be empty"):
        calibrate(model, [], step)
    assert type(model.easy) is nn.Linear
    with pytest.raises(
        ValueError, match=r"the pattern 'heasy' matches none of the 2 layers .* 'easy', 'hot'"
    ):
        convert_to_halo_training(model, recipe={"heasy": "fp8", "*": "int8"})
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        convert_to_halo_training(model, recipe={"*": "int9"})
    assert type(model.easy) is nn.Linear
    path = tmp_path / "recipe.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"recipe.json must be a JSON object with \"recipe\""):
        load_recipe(path)
    path.write_text('{"recipe": {"*": {"fromat": "int8"}}}')
    with pytest.raises(ValueError, match="fromat"):
        load_recipe(path)
    path.write_text('{"recipe": {"*": "int9"}}')
    with pytest.raises(ValueError, match=r"recipe.json: recipe must be one of"):
        load_recipe(path)
