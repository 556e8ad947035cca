"""Equalisation factors from several batches: the same however the rows are shared out, for every way in which layers read their input.

Several ranks: tests/test_fsdp.py and tests/test_fsdp_fused.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from shared_input_fixtures import GROUPS, batch
from shared_input_fixtures import build as build_sharing
from torch import Tensor, nn

from halo_train import (
    HaloLinear,
    collect_equalizers,
    convert_to_halo_training,
    equalizer_state_dict,
    load_equalizer_state_dict,
)
from halo_train.linear import halo_linears
from halo_train.training.blocks import checkpoint_activations, compile_blocks
from halo_train.training.data import Batch
from halo_train.training.loop import prepare_equalizers
from halo_train.training.loss import TokenLoss

IDS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def build(kind: str = "Llama", **options: Any) -> nn.Module:
    transformers.set_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, use_cache=False, attention_dropout=0.1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    convert_to_halo_training(model, **options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 40.0
    return model.eval()


def collect(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    with collect_equalizers(model):
        for ids in batches:
            model(ids)
    return equalizer_state_dict(model)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("output_layer", [True, False])
def test_batches_share_out_the_rows_as_they_like(kind: str, fuse: bool, output_layer: bool) -> None:
    options = {"fuse": fuse, "output_layer": output_layer}
    found = [collect(build(kind, **options), *IDS.split(rows)) for rows in (1, 2, 4)]
    model = build(kind, **options)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert same(found[0], collect(model, *IDS.flip(0).split(1)))
    assert found[0].keys() == {name for name, _ in halo_linears(model)}
    assert any(exponent.any() for exponent in found[0].values())
    # One batch decides nothing by itself.
    assert not same(found[0], collect(build(kind, **options), IDS[:1]))
    ids = IDS[:2]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert same(found[0], equalizer_state_dict(model))


@pytest.mark.parametrize("in_training", [True, False])
def test_layers_that_share_an_input_share_factors(in_training: bool) -> None:
    models = [build_sharing().train(in_training) for _ in range(2)]
    for model, tokens in zip(models, (5, 1), strict=True):
        with collect_equalizers(model):
            for part in batch().split(tokens, dim=1):
                model(part)
    state = equalizer_state_dict(models[0])
    assert same(state, equalizer_state_dict(models[1]))
    for names in GROUPS:
        assert all(torch.equal(state[f"0.{names[0]}"], state[f"0.{name}"]) for name in names)
    block = models[0][0]
    assert block.q.input_group is block.v.input_group is not None
    assert block.q.input_group.settled
    assert len(block.q.input_group.members) == 3
    models[0].train()(batch()).sum().backward()
    assert same(state, equalizer_state_dict(models[0]))


def test_what_runs_inside() -> None:
    """No gradients; no factors; layers that have theirs, and modules that are compiled, go on as they were."""
    model = build()
    state = collect(model, IDS)
    some = {name: exponent for name, exponent in state.items() if "layers.0" in name}
    model = build()
    load_equalizer_state_dict(model, some)
    compiled: list[int] = []

    def count(graph: Any, *_: Any) -> Any:
        compiled.append(1)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=count)
    with collect_equalizers(model):
        assert not model(IDS).logits.requires_grad
        assert same(equalizer_state_dict(model), some)
        with collect_equalizers(model):  # the outer one takes them
            model(IDS)
        assert same(equalizer_state_dict(model), some)
    assert not compiled
    found = equalizer_state_dict(model)
    assert found.keys() == state.keys()
    assert same({name: found[name] for name in some}, some)
    model(IDS)
    assert compiled


def test_after_an_error_nothing_is_taken() -> None:
    model = build()
    with pytest.raises(IndexError):
        collect(model, IDS, IDS + 64)
    assert equalizer_state_dict(model) == {}
    assert same(collect(model, IDS[:2], IDS[2:]), collect(build(), IDS))


def test_layers_that_saw_nothing_take_their_next_batch() -> None:
    model = nn.Sequential(HaloLinear(16, 16), HaloLinear(16, 16), HaloLinear(16, 16, recipe="fp8_plain"))
    with collect_equalizers(model):
        model[0](torch.randn(4, 16))
        model[1](torch.empty(0, 16))
        model[2](torch.randn(4, 16))
        with pytest.raises(ValueError, match="halo_linear: "):
            model[1](torch.randn(4, 17))
    assert equalizer_state_dict(model).keys() == {"0"}
    model(torch.randn(4, 16))
    assert equalizer_state_dict(model).keys() == {"0", "1"}


def test_columns_that_are_not_finite_have_no_factor() -> None:
    layers = [HaloLinear(16, 16, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(8, 16) * torch.logspace(0, 3, 16, base=2).round()
    bad = x.clone()
    bad[1, 3], bad[2, 4] = torch.nan, torch.inf
    for layer, parts in zip(layers, (bad.split(1), bad.split(8)), strict=True):
        with collect_equalizers(layer):
            for part in parts:
                layer(part)
    exponents = [layer.equalizer_exponent for layer in layers]
    assert torch.equal(*exponents)
    assert exponents[0][3] == exponents[0][4] == 0
    assert exponents[0].any()


def test_a_fused_group_takes_new_factors_together() -> None:
    model = build()
    before = collect(model, IDS[:1])
    model.model.layers[0].self_attn.k_proj.reset_equalizer()
    after = collect(model, IDS)
    first = "model.layers.0.self_attn."
    group = {f"{first}{name}" for name in ("q_proj", "k_proj", "v_proj")}
    expected = collect(build(), IDS)
    assert all(torch.equal(after[name], (expected if name in group else before)[name]) for name in before)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_and_compiled_blocks(mode: Any) -> None:
    expected = collect(build(), IDS)
    model = build()
    checkpoint_activations(model, mode)
    assert same(collect(model, *IDS.split(1)), expected)
    if mode == "selective":
        compile_blocks(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert same(equalizer_state_dict(model), expected)


def test_the_training_program_draws_no_random_numbers_for_it() -> None:
    loss = TokenLoss(build(output_layer=True)).train()
    batches = [
        Batch(ids=ids, labels=ids, positions=None, tokens=ids.numel(), trained=ids.numel())
        for ids in IDS.split(1)
    ]
    before = torch.get_rng_state()
    prepare_equalizers(loss, batches, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.training
    assert loss.model.training
    found = equalizer_state_dict(loss.model)
    other = TokenLoss(build(output_layer=True))
    prepare_equalizers(
        other, [Batch(ids=IDS, labels=IDS, positions=None, tokens=48, trained=48)], torch.device("cpu")
    )
    assert same(found, equalizer_state_dict(other.model))
    assert len(found) == len(list(halo_linears(loss.model)))
