"""QuantMetrics: tensors and products of every recipe against an independent float64 computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from metrics_fixtures import ALL, capture, measure, toy, train_step
from torch import nn

from halo_train import QuantMetrics, convert_to_halo_training
from halo_train.metrics import PRODUCTS

WHAT_IF = ("fp8", "int8", "fp8_plain", "halo0_fp8", "halo1_int8", "halo2_fp8")


# An independent implementation of the recipes in NumPy float64: docs/numerics.md, equations 1 to 7.


def round_to(a: np.ndarray, fmt: str, rowwise: bool) -> tuple[np.ndarray, np.ndarray]:
    amax = np.abs(a).max(1, keepdims=True) if rowwise else np.abs(a).max()
    qmax = {"int8": 127, "fp8": 448}[fmt]
    scale = np.where(amax == 0, 1, amax / qmax)
    q = a / scale
    if fmt == "int8":
        return np.rint(q), scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(q), 1e-300))), -6)
    return np.clip(np.rint(q / 2 ** (exponent - 3)) * 2 ** (exponent - 3), -448, 448), scale


def hadamard(n: int) -> np.ndarray:
    block = n & -n
    return np.kron(np.eye(n // block), scipy.linalg.hadamard(block)) / math.sqrt(block)


def by_hand(x, w, e, recipe: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{product: (exact, rounded)}, all three with tokens (columns for wgrad) as rows."""
    exact = {"fprop": x @ w.T, "dgrad": e @ w, "wgrad": (e.T @ x).T}
    (m, k), n = x.shape, w.shape[0]
    pad = [(0, -size % 16) for size in (m, n, k)]
    x, w, e = np.pad(x, (pad[0], pad[2])), np.pad(w, (pad[1], pad[2])), np.pad(e, (pad[0], pad[1]))
    fmt, rowwise = "int8" if "int8" in recipe else "fp8", not recipe.startswith("halo")
    rotated, equalised = recipe not in ("fp8_plain", "halo0_fp8"), recipe in ("fp8", "int8")
    h = hadamard(x.shape[1]) if rotated else np.eye(x.shape[1])
    d = np.ones(x.shape[1])
    if equalised:
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.round(0.5 * np.log2(np.abs(x).max(0) / np.abs(w).max(0)))
        finite = np.sort(exponent[np.isfinite(exponent)])
        d = np.where(np.isfinite(exponent), 2.0 ** (exponent - finite[(len(finite) - 1) // 2]), 1)
    xq, s = round_to((x / d) @ h, fmt, rowwise)
    wq, t = round_to((w * d) @ h, fmt, rowwise)
    y = (s * xq) @ (t * wq).T
    twice = equalised  # rounded by columns for dgrad; in int8 with its rows brought nearer to each other
    levels = np.sqrt(t[:, 0]) if recipe == "int8" else np.ones(len(w))
    fold_t, fold_s = (levels if twice else t.T, s) if rowwise else (1, 1)
    hm = np.eye(len(e))
    if recipe.startswith("halo2"):
        e_dgrad = np.pad(e, ((0, -len(e) % min(256, 1 << (len(e) - 1).bit_length())), (0, 0)))
        hm = hadamard(len(e_dgrad))
    else:
        e_dgrad = e
    ea, u = round_to(hm @ (e_dgrad * fold_t), fmt, rowwise)
    if twice:
        wc, c = round_to((w / levels[:, None]).T, fmt, rowwise)
        dx = u * (ea @ wc.T) * c.T
    else:
        dx = hm.T @ (u * (ea @ (wq if rowwise else t * wq))) @ h.T / d
    eb, v = round_to((fold_s * e).T, fmt, rowwise)
    dw = (v * (eb @ (xq if rowwise else s * xq))) @ h.T * d
    rounded = {"fprop": y[:m, :n], "dgrad": dx[:m, :k], "wgrad": dw[:n, :k].T}
    return {p: (exact[p], rounded[p]) for p in PRODUCTS}


def stats_by_hand(exact: np.ndarray, rounded: np.ndarray) -> dict[str, float]:
    signal, noise = (exact**2).sum(1), ((rounded - exact) ** 2).sum(1)
    rows = 10 * np.log10(signal[signal > 0] / noise[signal > 0])
    return {
        "sqnr_db": 10 * np.log10(signal.sum() / noise.sum()),
        "median_db": np.median(rows),
        "p10_db": np.quantile(rows, 0.1),
        "min_db": rows.min(),
        "cosine": (exact * rounded).sum() / np.sqrt(signal.sum() * (rounded**2).sum()),
        "bias": ((rounded - exact) * exact).sum() / signal.sum(),
    }


def agrees(ours: dict[str, float], expected: dict[str, float]) -> None:
    # float32 scales move single ties; a row's minimum feels them most.
    for stat, value in expected.items():
        tolerance = {"cosine": 2e-5, "bias": 2e-4, "min_db": 0.3}.get(stat, 0.05)
        assert ours[stat] == pytest.approx(value, abs=tolerance), stat


@pytest.mark.parametrize("recipe", WHAT_IF)
@pytest.mark.parametrize(("m", "k"), [(96, 64), (37, 72)])
def test_products_of_every_recipe(recipe, m, k):
    model = toy("bf16", k)
    x = torch.randn(m, k) * torch.exp(torch.randn(k))
    x[:, 5] *= 20
    found = capture(model[0])
    values = measure(model, x, what_if=[recipe])["0"]
    tensors = [t.detach().double().numpy() for t in (found["x"], model[0].weight, found["e"])]
    for product, pair in by_hand(*tensors, recipe).items():
        agrees(values[f"{product}@{recipe}"], stats_by_hand(*pair))


class Parallel(nn.Module):
    """Layers of equal shape, each with an input of another scale; one of another shape among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 48 if i == 1 else 80) for i in range(4))

    def forward(self, x):
        return sum((layer(x * 3.0**i).square() * 2.0**i).mean() for i, layer in enumerate(self.layers))


@pytest.mark.parametrize("own", ["bf16", "fp8", "halo2_fp8"])
def test_sampled_blocks_of_layers_that_are_reduced_together(own):
    """Each layer by hand on the rows and columns that were drawn, operands rounded as in the whole tensors."""
    model, x = Parallel(), torch.randn(96, 64) * torch.exp(torch.randn(64))
    x[7] *= 4
    convert_to_halo_training(model, recipe=own)
    found = [capture(layer) for layer in model.layers]
    with QuantMetrics(model, every=2, sample_size=32, what_if=WHAT_IF) as metrics:
        model(x).backward()
        (draws,) = metrics._sampled._draws.values()
        metrics.step()
    tokens = draws.take("tokens", 96).numpy()
    inputs = draws.take("inputs", 64).numpy()
    for i, layer in enumerate(model.layers):
        outputs = draws.take("outputs", layer.out_features).numpy()
        tensors = [t.detach().double().numpy() for t in (found[i]["x"], layer.weight, found[i]["e"])]
        blocks = {
            "fprop": np.ix_(tokens, outputs),
            "dgrad": np.ix_(tokens, inputs),
            "wgrad": np.ix_(inputs, outputs),
        }
        for recipe in WHAT_IF:
            for product, pair in by_hand(*tensors, recipe).items():
                values = metrics.last.values[f"layers.{i}"][f"{product}@{recipe}"]
                agrees(values, stats_by_hand(*(whole[blocks[product]] for whole in pair)))
        assert metrics.last.values[f"layers.{i}"]["x"]["amax"] == np.abs(tensors[0]).max()


@pytest.mark.parametrize("own", ["bf16", "fp8", "fp8_plain", "halo0_fp8", "halo2_fp8"])
def test_layers_measured_together_are_as_measured_alone(own):
    """Every stat and histogram of layers that share the draw."""
    model, x = Parallel(), torch.randn(96, 64)
    convert_to_halo_training(model, recipe=own)
    samples = {}
    for layers in ("*", "layers.0", "layers.2", "layers.3"):
        with QuantMetrics(
            model, every=2, sample_size=32, layers=[layers], what_if=["fp8", "halo0_fp8"]
        ) as metrics:
            model(x).backward()
            metrics.step()
            samples[layers] = metrics.last
    for name in ("layers.0", "layers.2", "layers.3"):
        for part, stats in samples[name].values[name].items():
            assert samples["*"].values[name][part] == pytest.approx(stats, rel=1e-9), part
        assert samples["*"].histograms[name] == samples[name].histograms[name]


@pytest.mark.parametrize("recipe", WHAT_IF)
def test_operands_of_every_recipe(recipe):
    """What stands under x_operand, w_operand, e_dgrad_operand, e_wgrad_operand."""
    model, x = toy(recipe), torch.randn(48, 64)
    x[:, 3] *= 30
    found = capture(model[0])
    values = measure(model, x, what_if=[])["0"]
    x, w, e = (t.detach().double().numpy() for t in (found["x"], model[0].weight, found["e"]))
    layer = model[0]
    d = layer.equalizer().double().numpy() if layer.config.equalize else np.ones(64)
    h = hadamard(64) if layer.config.rotate_k else np.eye(64)
    fmt, rowwise = "int8" if "int8" in recipe else "fp8", not recipe.startswith("halo")
    operands = {"x": x, "w": w, "e": e, "x_operand": (x / d) @ h, "w_operand": (w * d) @ h}
    s, t = (round_to(operands[f"{name}_operand"], fmt, rowwise)[1] for name in "xw")
    hm = hadamard(64)[:, :48] if recipe.startswith("halo2") else np.eye(48)
    folded = rowwise and not layer.config.requantize_w_dgrad
    factors = t.T if folded else np.sqrt(t.T) if recipe == "int8" else 1
    operands["e_dgrad_operand"] = hm @ (e * factors)
    operands["e_wgrad_operand"] = ((s if rowwise else 1) * e).T
    for part, exact in operands.items():
        q, scale = round_to(exact, fmt, rowwise)
        rms = np.sqrt((exact**2).mean())
        ours = values[part]
        assert ours["amax"] == pytest.approx(np.abs(exact).max(), rel=1e-5), part
        if part != "e_dgrad_operand" or not recipe.startswith("halo2"):
            assert ours["rms"] == pytest.approx(rms, rel=1e-4), part
            assert ours["crest"] == pytest.approx(np.abs(exact).max() / rms, rel=1e-4)
            assert ours["kurtosis"] == pytest.approx((exact**4).mean() / rms**4, rel=1e-3)
            agrees(ours, {k: v for k, v in stats_by_hand(exact, q * scale).items() if k.endswith("db")})
            share = (q[exact != 0] == 0).mean()
            assert ours["underflow"] == pytest.approx(share, abs=2e-3), part
            limit = 127 if fmt == "int8" else 448
            assert ours["saturation"] == pytest.approx((np.abs(q) >= limit)[exact != 0].mean(), abs=2e-3)


def test_a_sample_is_unbiased_and_its_size_is_stated():
    """Means of the sampled ratio over many draws meet that of the whole tensors; a fixed block would not."""
    model, x = toy("fp8_plain"), torch.randn(400, 64) * torch.exp(torch.randn(400, 1))
    whole = measure(model, x, what_if=[])["0"]
    draws = []
    for seed in range(60):
        metrics = QuantMetrics(model, sample_size=64, seed=seed, what_if=[], layers=["0"])
        train_step(model, x)
        flat = metrics.step()
        metrics.close()
        draws.append([flat[f"quant/0/{product}/sqnr_db"] for product in PRODUCTS])
    assert {k: v for k, v in flat.items() if k.startswith("quant/sample/")} == {
        "quant/sample/tokens": 64.0,
        "quant/sample/out_features": 64.0,
        "quant/sample/in_features": 16.0,
    }
    expected = [whole[product]["sqnr_db"] for product in PRODUCTS]
    error = np.mean(draws, 0) - expected
    assert (np.abs(error) < 4 * np.std(draws, 0) / math.sqrt(len(draws)) + 0.05).all()
    assert (np.std(draws, 0) > 0).all()


def test_dead_tokens():
    model, x, loss_weight = toy("halo0_fp8"), torch.randn(200, 64), torch.full((200, 1), 1e-7)
    loss_weight[:4] = 1
    metrics = QuantMetrics(model, sample_size=ALL, what_if=["fp8_plain"])
    (model(x) * loss_weight).sum().backward()
    metrics.step()
    values = metrics.last.values["2"]  # what it flushes does not even reach layer 0
    assert values["dgrad"]["sqnr_db"] > 20  # the norm does not see them
    assert values["dgrad"]["median_db"] == values["dgrad"]["p10_db"] == 0
    assert values["e"]["underflow"] > 0.9
    assert values["dgrad@fp8_plain"]["p10_db"] > 20


def test_nan_is_visible_and_stays_where_it_is():
    model, x = toy("fp8_plain"), torch.randn(50, 64)
    x[7, 3] = math.nan
    metrics = QuantMetrics(model, sample_size=ALL, what_if=["halo0_fp8"])
    train_step(model, x)
    flat = metrics.step()
    assert flat["quant/0/x/nonfinite"] == 1 / 50
    assert math.isnan(flat["quant/0/fprop/sqnr_db"])
    assert flat["quant/0/fprop/median_db"] > 20  # the other tokens
    assert flat["quant/0/fprop@halo0_fp8/median_db"] == -300  # one scale for all: every token is lost
    assert flat["quant/worst_layer/x/nonfinite"] == 1 / 50


def test_wgrad_of_a_hugging_face_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)
    )  # fmt: skip
    convert_to_halo_training(model, recipe="int8")
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    found = capture(layer)
    metrics = QuantMetrics(model, sample_size=ALL, what_if=[])
    ids = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    metrics.step()
    x, e = (found[key].double().reshape(60, -1).numpy() for key in ("x", "e"))
    d = layer.equalizer().double().numpy()
    xq, s = round_to((x / d) @ hadamard(80), "int8", True)
    eb, v = round_to((s * e).T, "int8", True)
    exact, rounded = e.T @ x, (v * (eb @ xq)) @ hadamard(80).T * d
    assert layer.weight.grad.double().numpy() == pytest.approx(rounded, abs=1e-3 * np.abs(rounded).max())
    agrees(metrics.last.values[name]["wgrad"], stats_by_hand(exact.T, rounded.T))
