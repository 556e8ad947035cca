"""product_errors() and measure_products(): the design's SQNR table, and errors of layers inside a model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from halo_train import RECIPES, HaloConfig, HaloLinear, convert_to_halo_training, measure_products, quantize
from halo_train.metrics import PRODUCTS, ProductError, product_errors, sqnr_db

TORCHAO_TENSORWISE = HaloConfig(
    format="e4m3",
    grad_format="e5m2",
    scaling="tensorwise",
    rotate_k=False,
    requantize_w_dgrad=False,
    equalize=False,
)

# Norm-wise / median dB over tokens (columns for wgrad) of fprop, dgrad, wgrad: docs/numerics.md, section 3.
TABLE: dict[str, tuple[HaloConfig, list[float]]] = {
    "tensorwise e4m3, e5m2 gradients": (TORCHAO_TENSORWISE, [28.3, 21.0, 24.8, 24.5, 18.0, 5.7]),
    "halo0_fp8": (RECIPES["halo0_fp8"], [28.3, 21.0, 28.6, 0.0, 18.6, 5.7]),
    "halo1_fp8": (RECIPES["halo1_fp8"], [28.9, 28.4, 28.8, 0.0, 28.1, 18.1]),
    "folded e4m3": (RECIPES["fp8_plain"], [28.3, 29.8, 28.4, 28.6, 31.9, 31.1]),
    "folded, rotated e4m3": (
        dataclasses.replace(RECIPES["fp8"].with_folded_dgrad, equalize=False),
        [28.7, 28.6, 28.6, 28.6, 30.4, 19.2],
    ),
    "fp8": (RECIPES["fp8"], [40.0, 35.0, 28.6, 28.6, 33.2, 26.7]),
    "fp8, folded dgrad": (RECIPES["fp8"].with_folded_dgrad, [40.0, 35.0, 24.3, 24.2, 33.2, 26.7]),
    "folded, rotated int8": (
        dataclasses.replace(RECIPES["int8"].with_folded_dgrad, equalize=False),
        [40.0, 40.2, 38.2, 38.6, 35.2, 29.9],
    ),
    "int8": (RECIPES["int8"], [51.3, 45.8, 38.8, 38.7, 34.1, 32.5]),
    "int8, folded dgrad": (RECIPES["int8"].with_folded_dgrad, [51.3, 45.8, 34.3, 34.7, 34.1, 32.5]),
}
OWN_OPERANDS = {"e4m3": [28.3, 29.8, 28.6, 28.6, 29.2, 30.1], "int8": [28.2, 26.8, 38.8, 38.7, 0.9, 0.0]}


@pytest.fixture(scope="module")
def outliers():
    """M=2048, K=1024, N=2048; X with 8 channels x60, log-normal(1) tokens, 2 tokens x300; E log-normal(4) over tokens."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2048, 1024, generator=g)
    x[:, torch.randperm(1024, generator=g)[:8]] *= 60
    x *= torch.exp(torch.randn(2048, 1, generator=g))
    x[torch.randperm(2048, generator=g)[:2]] *= 300
    w = torch.randn(2048, 1024, generator=g) / 32
    e = torch.randn(2048, 2048, generator=g) * torch.exp(4 * torch.randn(2048, 1, generator=g))
    return x, w, e


def flat(errors: dict[str, ProductError]) -> list[float]:
    return [value for p in PRODUCTS for value in (errors[p].sqnr_db, errors[p].median_db)]


@pytest.mark.parametrize("scheme", TABLE)
def test_sqnr_table_of_the_design(scheme, outliers):
    config, expected = TABLE[scheme]
    assert flat(product_errors(*outliers, config)) == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize("fmt", OWN_OPERANDS)
def test_sqnr_of_operands_quantised_per_product(fmt, outliers):
    """torchao's rowwise recipe, which keeps X in high precision: the comparison that the folded scales are held to."""
    x, w, e = outliers
    q = [quantize(t, fmt).dequantize() for t in (x, w, e, w.t(), e.t(), x.t())]
    got = []
    for exact, ours, dim in (
        (x.double() @ w.double().t(), q[0] @ q[1].t(), 1),
        (e.double() @ w.double(), q[2] @ q[3].t(), 1),
        (e.double().t() @ x.double(), q[4] @ q[5].t(), 0),
    ):
        got += [sqnr_db(exact, ours).item(), sqnr_db(exact, ours, dim=dim).median().item()]
    assert got == pytest.approx(OWN_OPERANDS[fmt], abs=1.0)


def test_sqnr_of_known_noise():
    x = torch.ones(4, 100, dtype=torch.float64)
    assert sqnr_db(x, x * 1.1).item() == pytest.approx(20)
    assert sqnr_db(x, x * 1.1, dim=1).shape == (4,)
    assert math.isinf(sqnr_db(x, x).item())


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 8))


def test_measure_products_matches_the_layer_alone():
    model, x = toy(), torch.randn(40, 64)
    convert_to_halo_training(model, recipe="int8")
    captured = {}

    def capture(module, inputs, y):
        y.register_hook(lambda e: captured.update(e=e.clone()))

    model[0].register_forward_hook(capture)

    def step():
        model(x).square().mean().backward()

    errors = measure_products(model, step)
    assert list(errors) == ["0", "2"]
    expected = product_errors(x, model[0].weight, captured["e"], RECIPES["int8"], model[0].equalizer())
    assert errors["0"] == expected
    assert all(30 < errors[layer][p].sqnr_db < 60 for layer in errors for p in PRODUCTS)
    assert not model[2]._forward_hooks


def test_what_if_another_recipe_ran_on_the_same_data():
    model, x = toy(), torch.randn(40, 64)
    x[:, 5] *= 200
    convert_to_halo_training(model, recipe="bf16")

    def step():
        model(x).square().mean().backward()

    own, plain, rotated = (measure_products(model, step, recipe=r) for r in (None, "halo0_int8", "int8"))
    assert own["0"]["fprop"].sqnr_db > 100
    assert rotated["0"]["fprop"].median_db > plain["0"]["fprop"].median_db + 6
    assert model[0].config == RECIPES["bf16"]


def test_tokens_without_signal_do_not_count():
    x, w, e = torch.randn(64, 32), torch.randn(16, 32), torch.randn(64, 16)
    e[20:] = 0
    kept = product_errors(x, w, e, RECIPES["fp8_plain"])["dgrad"]
    assert 20 < kept.p10_db <= kept.median_db < 40


def test_refused():
    with pytest.raises(ValueError, match="no HaloLinear; call convert_to_halo_training"):
        measure_products(toy(), lambda: None)
    with pytest.raises(ValueError, match="no backward through a HaloLinear"):
        measure_products(nn.Sequential(HaloLinear(16, 16)), lambda: None)
