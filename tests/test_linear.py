"""HaloLinear as a module: state_dict, copies, devices, equalisation, accuracy per recipe, compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from halo_train import RECIPES, HaloLinear, equalizer_state_dict, load_equalizer_state_dict


def outlier_batch(tokens: int = 64, features: int = 64) -> torch.Tensor:
    x = torch.randn(tokens, features)
    x[:, 3] *= 100
    return x


def test_state_dict_is_that_of_nn_linear_both_ways():
    linear = nn.Linear(48, 32, dtype=torch.bfloat16)
    halo = HaloLinear(48, 32, dtype=torch.bfloat16)
    halo(torch.randn(4, 48, dtype=torch.bfloat16))
    halo.load_state_dict(linear.state_dict(), strict=True)
    assert list(halo.state_dict()) == ["weight", "bias"]
    nn.Linear(48, 32, dtype=torch.bfloat16).load_state_dict(halo.state_dict(), strict=True)
    assert all(halo.state_dict()[k].dtype is v.dtype for k, v in linear.state_dict().items())


def test_from_and_to_linear_share_parameters_hooks_and_mode():
    linear = nn.Linear(48, 32).eval()
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    linear.weight.requires_grad_(False)
    halo = HaloLinear.from_linear(linear, "int8")
    back = halo.to_linear()
    for module in (halo, back):
        assert module.weight is linear.weight
        assert module.bias is linear.bias
        assert not module.training
        module(torch.randn(2, 48))
    assert len(calls) == 2
    assert type(back) is nn.Linear
    assert set(vars(back)) == set(vars(linear))
    assert "recipe=int8" in repr(halo)


def test_without_bias():
    halo = HaloLinear.from_linear(nn.Linear(32, 16, bias=False))
    assert halo.bias is None
    assert list(halo.state_dict()) == ["weight"]
    assert halo.to_linear().bias is None


def test_deepcopy_and_pickle_keep_the_equalizer():
    halo = HaloLinear(64, 32)
    x = outlier_batch()
    y = halo(x)
    for twin in (copy.deepcopy(halo), pickle.loads(pickle.dumps(halo))):
        assert twin.weight is not halo.weight
        assert torch.equal(twin(x), y)
    buffer = io.BytesIO()
    torch.save(halo, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


def test_meta_device():
    with torch.device("meta"):
        halo = HaloLinear(64, 32)
    assert halo(torch.empty(4, 64, device="meta")).shape == (4, 32)
    assert not halo.equalizer_taken
    halo.to_empty(device="cpu")
    nn.init.normal_(halo.weight)
    nn.init.zeros_(halo.bias)
    x = outlier_batch()
    assert torch.isfinite(halo(x)).all()
    assert halo.equalizer()[3] > 1


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_changing_the_dtype_keeps_the_equalizer(convert):
    halo = HaloLinear(64, 32)
    halo(outlier_batch())
    d = halo.equalizer()
    convert(halo)
    assert torch.equal(halo.equalizer(), d)
    assert halo(outlier_batch().to(halo.weight.dtype)).dtype is halo.weight.dtype


@pytest.mark.parametrize(
    ("recipe", "floor"), [("fp8", 27), ("int8", 38), ("fp8_plain", 27), ("halo2_int8", 30)]
)
def test_accuracy_with_outlier_channels(recipe, floor):
    linear = nn.Linear(256, 128)
    halo = HaloLinear.from_linear(linear, recipe)
    x = outlier_batch(128, 256)
    noise = (halo(x) - linear(x)).norm() / linear(x).norm()
    assert -20 * torch.log10(noise) > floor


def test_equalizer_is_taken_once_and_again_on_request():
    halo = HaloLinear(64, 32)
    halo(torch.empty(0, 64))
    assert not halo.equalizer_taken
    assert equalizer_state_dict(halo) == {}
    halo(outlier_batch())
    first = halo.equalizer_exponent.clone()
    assert first[3] > 0
    halo(torch.randn(64, 64))
    assert torch.equal(halo.equalizer_exponent, first)
    halo.reset_equalizer()
    halo(torch.randn(64, 64))
    assert halo.equalizer_exponent[3] == 0


@pytest.mark.parametrize(
    "bad", [torch.ones(4, 63), torch.ones(4, 64).long(), torch.ones(4, 64).to(torch.float8_e4m3fn)]
)
def test_bad_input_gets_its_message_and_leaves_no_equalizer(bad):
    halo = HaloLinear(64, 32)
    with pytest.raises(ValueError, match="halo_linear: "):
        halo(bad)
    assert not halo.equalizer_taken


def test_recipes_that_do_not_equalise_take_nothing():
    halo = HaloLinear(64, 32, recipe="fp8_plain")
    halo(outlier_batch())
    assert halo.equalizer() is None


def test_equalizer_state_round_trip():
    model = nn.Sequential(HaloLinear(64, 32), nn.ReLU(), HaloLinear(32, 16))
    model(outlier_batch())
    state = equalizer_state_dict(model)
    assert list(state) == ["0", "2"]
    twin = nn.Sequential(HaloLinear(64, 32), nn.ReLU(), HaloLinear(32, 16))
    twin.load_state_dict(model.state_dict())
    load_equalizer_state_dict(twin, state)
    x = torch.randn(8, 64)
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match=r"names '1'.*no HaloLinear"):
        load_equalizer_state_dict(twin, {"1": state["0"]})
    with pytest.raises(ValueError, match=r"'2' must have shape \(32,\); got \(64,\)"):
        load_equalizer_state_dict(twin, {"2": state["0"]})
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_used_twice_sums_its_gradients(recipe):
    halo = HaloLinear(32, 32, recipe=RECIPES[recipe].without_rounding())
    linear = halo.to_linear()
    x = torch.randn(8, 32)
    halo(halo(x)).square().sum().backward()
    ours, linear.weight.grad = halo.weight.grad, None
    linear(linear(x)).square().sum().backward()
    torch.testing.assert_close(ours, linear.weight.grad, rtol=1e-4, atol=1e-4)


def test_frozen_weight_gets_no_gradient():
    halo = HaloLinear(32, 16)
    halo.weight.requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    halo(x).sum().backward()
    assert halo.weight.grad is None
    assert x.grad is not None
    assert halo.bias.grad is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_compile_fullgraph_gives_the_eager_bits(recipe):
    torch.compiler.reset()
    halo = HaloLinear(48, 33, recipe=recipe)
    x = torch.randn(5, 48)
    compiled = torch.compile(halo, fullgraph=True, backend="aot_eager")
    results = []
    for function in (halo, compiled):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        halo.zero_grad()
        y.square().sum().backward()
        results.append((y, inputs.grad, halo.weight.grad.clone(), halo.bias.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recompute_under_activation_checkpointing_is_bitwise_equal():
    halo = HaloLinear(64, 64)
    x = outlier_batch().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(halo, x, use_reentrant=False)
    y.square().sum().backward()
    dx, dw = x.grad.clone(), halo.weight.grad.clone()
    halo.zero_grad()
    x.grad = None
    halo(x).square().sum().backward()
    assert torch.equal(dx, x.grad)
    assert torch.equal(dw, halo.weight.grad)


def test_fsdp1_is_refused():
    halo = HaloLinear(32, 16)
    flat = nn.Parameter(torch.randn(16 * 32))
    flat._fsdp_flattened = True
    del halo._parameters["weight"]
    halo.__dict__["weight"] = flat.view(16, 32)
    with pytest.raises(ValueError, match=r"FSDP1.*use torch.distributed.fsdp.fully_shard"):
        halo(torch.randn(4, 32))


def test_unknown_recipe():
    with pytest.raises(ValueError, match="did you mean 'fp8'"):
        HaloLinear(8, 8, recipe="fp9")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 48), (3, 5, 48), (5, 48), (48,)])
def test_the_output_can_be_written_to_in_place(shape: tuple[int, ...], compiled: bool):
    """As that of nn.Linear: ``x += y``, nn.ReLU(inplace=True). 15 and 5 tokens and 40 features are padded inside."""
    model = nn.Sequential(HaloLinear(48, 40, bias=False), nn.ReLU(inplace=True))
    x = torch.randn(shape, requires_grad=True)
    expected = model[0](x).relu()
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True)
    y = model(x)
    assert not model[0](x)._is_view()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected_dx)
