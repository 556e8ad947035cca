"""halo_linear(): identities without rounding, what is saved, bad input; errors of the paper's recipes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halo_train import RECIPES, HaloConfig, halo_linear
from halo_train.functional import HaloLinearFunction, quantize_weight

SHAPES = [(64, 64, 64), (5, 7, 3), (100, 48, 33), (17, 130, 100), (300, 64, 96), (1, 16, 512), (33, 1, 1)]
QUANTISED = [name for name in RECIPES if name != "bf16"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def grads(function, x, w, b, e):
    x, w, b = (t.detach().clone().requires_grad_() for t in (x, w, b))
    y = function(x, w, b)
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), e)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_without_rounding_every_recipe_is_nn_linear(recipe, m, n, k):
    x, w, b, e = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    d = torch.exp2(torch.randint(-3, 4, (k,)).float())
    config = RECIPES[recipe].without_rounding()
    exact = grads(F.linear, x.double(), w.double(), b.double(), e.double())
    ours = grads(
        lambda *t: halo_linear(*t, config=config, equalizer=d if config.equalize else None), x, w, b, e
    )
    for name, mine, true in zip(("y", "dx", "dw", "db"), ours, exact, strict=True):
        assert relative(mine, true) < 1e-5, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradcheck_in_float64(recipe):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 6), (5, 6)))
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    config = RECIPES[recipe].without_rounding()
    d = torch.tensor([1, 2, 0.5, 4, 1, 0.25], dtype=torch.float64) if config.equalize else None
    assert torch.autograd.gradcheck(
        lambda x, w, b: halo_linear(x, w, b, config=config, equalizer=d), (x, w, b)
    )


def test_rotation_along_tokens_with_row_scales():
    config = HaloConfig(rotate_m_dgrad=True).without_rounding()
    x, w, e = torch.randn(40, 32), torch.randn(24, 32), torch.randn(40, 24)
    ours = grads(lambda *t: halo_linear(*t, config=config), x, w, torch.zeros(24), e)
    for mine, true in zip(ours, grads(F.linear, x, w, torch.zeros(24), e), strict=True):
        assert relative(mine, true) < 1e-5


# Relative Frobenius errors of Y / dX / dW: T=1024 tokens, I=O=2048, Gaussian X, W, E, one scale a tensor, computed by an
# independent NumPy program (its FP6 rows need a format that the library does not have yet).
PAPER = {
    ("none", "int8"): [(0.017, 0.017, 0.017), (0.017, 0.017, 0.018), (0.017, 0.017, 0.018)],
    ("none", "fp8"): [(0.037, 0.037, 0.037)] * 3,
    ("X60", "int8"): [(0.183, 0.017, 0.180), (0.018, 0.018, 0.017), (0.018, 0.018, 0.017)],
    ("X60", "fp8"): [(0.038, 0.037, 0.038), (0.038, 0.037, 0.037), (0.038, 0.037, 0.037)],
    ("E60", "int8"): [(0.016, 0.140, 0.142), (0.016, 0.140, 0.142), (0.016, 0.016, 0.142)],
    ("X60+E60", "int8"): [(0.184, 0.138, 0.185), (0.016, 0.138, 0.110), (0.016, 0.016, 0.110)],
}


@pytest.mark.parametrize(("outliers", "fmt"), PAPER)
def test_paper_recipes_have_the_reference_errors(outliers, fmt):
    g = torch.Generator().manual_seed(0)
    x, w, e = (torch.randn(s, generator=g) for s in ((1024, 2048), (2048, 2048), (1024, 2048)))
    if "X60" in outliers:
        x[:, torch.randperm(2048, generator=g)[:4]] *= 60
    if "E60" in outliers:
        e[torch.randperm(1024, generator=g)[:4]] *= 60
    zero = torch.zeros(2048)
    exact = grads(F.linear, x.double(), w.double(), zero.double(), e.double())
    for level, expected in enumerate(PAPER[outliers, fmt]):
        config = RECIPES[f"halo{level}_{fmt}"]
        ours = grads(lambda *t, config=config: halo_linear(*t, config=config), x, w, zero, e)
        errors = [relative(mine, true) for mine, true in zip(ours[:3], exact[:3], strict=True)]
        assert errors == pytest.approx(expected, rel=0.2), level


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_leading_shapes(recipe, dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in ((2, 3, 40), (24, 40), (24,)))
    e = torch.randn(2, 3, 24).to(dtype)
    ours = grads(lambda *t: halo_linear(*t, config=RECIPES[recipe]), x, w, b, e)
    exact = grads(F.linear, x.double(), w.double(), b.double(), e.double())
    for mine, true in zip(ours, exact, strict=True):
        assert mine.dtype is dtype
        assert mine.shape == true.shape
        assert relative(mine, true) < 0.1


def saved_tensors(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("recipe", QUANTISED)
def test_saved_for_backward_is_one_byte_per_element(recipe):
    m, n, k = 256, 64, 128
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(n, k, dtype=torch.bfloat16, requires_grad=True)
    d = torch.ones(k) if RECIPES[recipe].equalize else None
    saved = saved_tensors(lambda: halo_linear(x, w, config=RECIPES[recipe], equalizer=d))
    scales = (m + n) * 4 if RECIPES[recipe].scaling.value == "rowwise" else 8
    factors = 0 if d is None else 2 * 4 * k  # d and 1/d
    assert sum(t.numel() * t.element_size() for t in saved) == m * k + n * k + scales + factors
    assert {t.dtype for t in saved if t.numel() >= m * k} <= {torch.float8_e4m3fn, torch.int8}


def test_frozen_weight_saves_no_x_and_computes_no_wgrad(monkeypatch):
    products = []
    original = HaloLinearFunction.forward.__globals__["matmul"]
    monkeypatch.setitem(
        HaloLinearFunction.forward.__globals__, "matmul", lambda *a: products.append(1) or original(*a)
    )
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(48, 32)
    config = RECIPES["fp8_plain"]
    assert all(t.shape != (64, 32) for t in saved_tensors(lambda: halo_linear(x, w, config=config)))
    products.clear()
    halo_linear(x, w, config=config).sum().backward()
    assert len(products) == 2
    products.clear()
    halo_linear(x.detach(), w.requires_grad_(), config=config).sum().backward()
    assert len(products) == 2


def test_autocast_runs_in_its_dtype_and_rounds_the_weight_from_its_own():
    x, w = torch.randn(16, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = halo_linear(x, w, config=RECIPES["int8"])
    assert y.dtype is torch.bfloat16
    expected = halo_linear(x.bfloat16().float(), w, config=RECIPES["int8"]).bfloat16()
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype is torch.float32
    assert w.grad.dtype is torch.float32


def test_results_are_bitwise_repeatable():
    x, w, e = torch.randn(48, 64), torch.randn(32, 64), torch.randn(48, 32)
    for config in RECIPES.values():
        runs = [
            grads(lambda *t, c=config: halo_linear(*t, config=c), x, w, torch.zeros(32), e) for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("recipe", QUANTISED)
def test_nonfinite_input_surfaces(recipe):
    x, w = torch.randn(8, 32), torch.randn(16, 32)
    x[3, 4] = float("nan")
    y = halo_linear(x, w, config=RECIPES[recipe])
    assert torch.isnan(y[3]).all()
    if RECIPES[recipe].scaling.value == "rowwise":
        assert torch.isfinite(y[[0, 1, 2, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_empty_batch(recipe):
    x, w = torch.randn(0, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y = halo_linear(x, w, config=RECIPES[recipe])
    assert y.shape == (0, 16)
    y.sum().backward()
    assert (w.grad == 0).all()


def test_second_derivative_is_refused():
    x, w = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(halo_linear(x, w, config=RECIPES["fp8"]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (
            torch.ones(4, 8, dtype=torch.int64),
            {},
            "real floating-point dtype of at least 16 bits; got torch.int64",
        ),
        (torch.ones(4, 8, dtype=torch.complex64), {}, "got torch.complex64"),
        (torch.ones(4, 8).to(torch.float8_e5m2), {}, "got torch.float8_e5m2"),
        (torch.ones(4, 9), {}, r"last dimension of x must be in_features=8; got shape \(4, 9\)"),
        (
            torch.ones(4, 8, dtype=torch.bfloat16),
            {},
            "same dtype .*torch.bfloat16 and torch.float32.*torch.autocast",
        ),
        (torch.ones(4, 8), {"equalizer": torch.ones(4)}, r"equalizer must have shape \(8,\); got \(4,\)"),
    ],
)
def test_bad_input(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        halo_linear(x, torch.ones(16, 8), config=RECIPES["fp8"], **kwargs)


def test_a_weight_that_comes_rounded():
    x, w, d = torch.randn(8, 48), torch.randn(33, 48), torch.exp2(torch.randint(-3, 4, (48,)).float())
    config = RECIPES["fp8"]
    rounded = quantize_weight(w, d, config)
    y = halo_linear(x, w, config=config, equalizer=d)
    nothing = torch.full_like(w, torch.nan)
    assert torch.equal(halo_linear(x, nothing, config=config, equalizer=d, quantized_weight=rounded), y)
    with pytest.raises(
        ValueError, match=r"quantized_weight must have data of shape \(48, 48\).*got \(32, 48\)"
    ):
        halo_linear(x, w, config=config, quantized_weight=quantize_weight(w[:32], d, config))
