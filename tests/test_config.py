"""HaloConfig: recipes, refused combinations, error texts."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from halo_train import RECIPES, Format, HaloConfig, Scaling
from halo_train.config import resolve_recipe, storage_dtype


def test_the_named_recipes_are_the_ones_the_design_lists():
    paper = {f"halo{level}_{fmt}" for level in (0, 1, 2) for fmt in ("fp8", "int8")}
    assert set(RECIPES) == {"fp8", "int8", "fp8_plain", "bf16"} | paper


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_paper_levels_differ_only_in_their_rotations(fmt):
    rotations = [
        (c.rotate_k, c.rotate_m_dgrad) for c in (RECIPES[f"halo{level}_{fmt}"] for level in (0, 1, 2))
    ]
    assert rotations == [(False, False), (True, False), (True, True)]
    for level in (0, 1, 2):
        config = RECIPES[f"halo{level}_{fmt}"]
        assert config.scaling is Scaling.TENSORWISE
        assert not config.equalize


def test_config_is_hashable_picklable_and_knows_its_name():
    for name, config in RECIPES.items():
        assert pickle.loads(pickle.dumps(config)) == config
        assert {config: name}[HaloConfig.from_recipe(name)] == name
        assert config.name == name
    assert HaloConfig(recompute="mlp", fast_accum=False).name == "fp8, fast_accum=False, recompute=mlp"
    assert HaloConfig(rotate_k=False).name == "custom(e4m3, grad_e4m3, rowwise, requantize_w_dgrad, equalize)"


def test_folded_dgrad_is_the_only_difference():
    for config in RECIPES.values():
        folded = config.with_folded_dgrad
        assert not folded.requantize_w_dgrad
        assert dataclasses.replace(folded, requantize_w_dgrad=config.requantize_w_dgrad) == config
        assert folded.with_folded_dgrad is folded
    assert {name for name, config in RECIPES.items() if config.requantize_w_dgrad} == {"fp8", "int8"}


def test_strings_are_accepted_for_enums():
    assert HaloConfig(format="int8", grad_format="int8", scaling="rowwise") == RECIPES["int8"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("fp-8", "fp8"), ("halo1fp8", "halo1_fp8"), ("int-8", "int8"), ("FP8", "fp8"), ("zzz", None)],
)
def test_unknown_recipe_names_the_nearest(name, near):
    with pytest.raises(ValueError, match="recipe must be one of fp8, int8") as error:
        HaloConfig.from_recipe(name)
    assert repr(name) in str(error.value)
    hint = str(error.value).partition("; did you mean ")[2]
    assert hint == (f"{near!r}?" if near else "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "e4m4"}, "format must be one of .*'e4m4'; did you mean 'e4m3'"),
        (
            {"recompute": "mpl"},
            "recompute must be one of nothing, inputs, mlp; got 'mpl'; did you mean 'mlp'",
        ),
        ({"scaling": "rows"}, "scaling must be one of rowwise, tensorwise; got 'rows'"),
        ({"format": "int8"}, "same arithmetic .* format='int8', grad_format='e4m3'"),
        ({"format": "e5m2", "grad_format": "e5m2"}, "cannot both be 'e5m2'"),
        ({"format": "high_precision", "grad_format": "high_precision"}, "takes no rotation .* rotate_k=True"),
        (
            {"scaling": "tensorwise"},
            "requantize_w_dgrad .* needs scaling='rowwise'.* got scaling='tensorwise'",
        ),
    ],
)
def test_refused_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        HaloConfig(**fields)


def test_resolve_recipe_refuses_other_types():
    assert resolve_recipe("int8") is RECIPES["int8"]
    assert resolve_recipe(RECIPES["fp8"]) is RECIPES["fp8"]
    with pytest.raises(TypeError, match="recipe name or a HaloConfig; got int"):
        resolve_recipe(8)  # type: ignore[arg-type]


def test_storage_dtypes():
    assert storage_dtype(Format.E4M3, torch.bfloat16) is torch.float8_e4m3fn
    assert storage_dtype(Format.UNROUNDED, torch.bfloat16) is torch.float32
    assert storage_dtype(Format.UNROUNDED, torch.float64) is torch.float64
    with pytest.raises(ValueError, match="high_precision"):
        storage_dtype(Format.HIGH_PRECISION, torch.float32)
