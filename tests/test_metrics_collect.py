"""QuantMetrics: products against an independent float64 computation, any training loop, no trace between samples."""

from __future__ import annotations

import contextlib
import math
import socket

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from halo_train import RECIPES, HaloConfig, HaloLinear, QuantMetrics, convert_to_halo_training
from halo_train.fused import Projected
from halo_train.linear import halo_linears
from halo_train.metrics import PRODUCTS
from halo_train.metrics.reduce import reduce_wgrad
from halo_train.metrics.statistics import STATS_OF

ALL = 1 << 20
"""As sample_size: every row and column."""
WHAT_IF = ("fp8", "int8", "fp8_plain", "halo0_fp8", "halo1_int8", "halo2_fp8")


def toy(recipe: str | HaloConfig = "int8", k: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 8))
    convert_to_halo_training(model, recipe=recipe)
    return model


def train_step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def measure(model: nn.Module, x: torch.Tensor, **options) -> dict[str, dict[str, dict[str, float]]]:
    metrics = QuantMetrics(model, sample_size=ALL, **options)
    train_step(model, x)
    assert metrics.step()
    metrics.close()
    return metrics.last.values


def capture(layer: nn.Module) -> dict[str, torch.Tensor]:
    found = {}

    def hook(_, args, y):
        found["x"] = args[0].detach().clone()
        y.register_hook(lambda e: found.update(e=e.clone()))

    layer.register_forward_hook(hook)
    return found


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
    twice = equalised  # rounded by columns for dgrad, as it is
    fold_t, fold_s = (1 if twice else t.T, s) if rowwise else (1, 1)
    hm = np.eye(len(e))
    if recipe.startswith("halo2"):
        e_dgrad = np.pad(e, ((0, -len(e) % min(256, 1 << (len(e) - 1).bit_length())), (0, 0)))
        hm = hadamard(len(e_dgrad))
    else:
        e_dgrad = e
    ea, u = round_to(hm @ (e_dgrad * fold_t), fmt, rowwise)
    if twice:
        wc, c = round_to(w.T, fmt, rowwise)
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
    operands["e_dgrad_operand"] = hm @ (e * (t.T if folded else 1))
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


FUSED = ["llama", "gemma2", "phi3", "phi"]


def causal_lm(family: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).train()


def backward_of(model: nn.Module) -> None:
    ids = torch.randint(1, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("family", FUSED)
def test_operands_that_fused_blocks_show(family):
    """Without rounding they are those of the model before its conversion."""
    config = RECIPES["fp8"].without_rounding()
    model, shown = causal_lm(family), {}
    plain = {n: capture(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    backward_of(model)
    expected = {name: dict(found) for name, found in plain.items()}
    model = causal_lm(family)
    assert convert_to_halo_training(model, recipe=config).fused

    def show(layer, x, y):
        shown[layer.fqn] = {"x": x.detach().clone()}
        y.register_hook(lambda e: shown[layer.fqn].update(e=e.clone()))

    for _, layer in halo_linears(model):
        layer.register_operand_hook(show)
    backward_of(model)
    assert shown.keys() == dict(halo_linears(model)).keys()
    for name, tensors in shown.items():
        for key, tensor in tensors.items():
            reference = expected[name][key]
            assert torch.allclose(
                tensor, reference.view_as(tensor), rtol=1e-3, atol=1e-4 * reference.abs().max()
            )


@pytest.mark.parametrize("family", FUSED)
def test_fused_blocks_stay_fused_in_a_sampled_step(family, monkeypatch):
    model, called, forward = causal_lm(family), [], HaloLinear.forward
    assert convert_to_halo_training(model, recipe="fp8").fused
    monkeypatch.setattr(
        HaloLinear, "forward", lambda layer, x: (called.append(type(x)), forward(layer, x))[1]
    )
    gradients = []
    with QuantMetrics(model, every=2, what_if=["int8"]) as metrics:
        for sampled in (True, True, False):
            called.clear()
            backward_of(model)
            assert Projected in called
            assert bool(metrics.step()) == sampled
            assert metrics.last.values.keys() == metrics.layers.keys()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            model.zero_grad()
    # In a sampled step h is rounded as a tensor, and a gate_up_proj as one layer, which moves ties.
    assert (gradients[1] - gradients[2]).norm() < 0.03 * gradients[2].norm()


def test_every_stat_of_every_layer_is_in_the_flat_dict():
    model = toy()
    metrics = QuantMetrics(model, what_if=["fp8"])
    train_step(model, torch.randn(40, 64))
    flat = metrics.step()
    tensors, products = ["x", "w", "e"], [p + label for p in PRODUCTS for label in ("", "@fp8")]
    operands = ["x_operand", "w_operand", "e_dgrad_operand", "e_wgrad_operand"]
    for layer in ("0", "2"):
        for parts, kinds in (
            (products, ["product"]),
            (tensors + operands, ["scale", "rows", "columns", "rounding"]),
        ):
            stats = [stat for kind in kinds for stat in STATS_OF[kind]]
            for part in parts:
                assert all(math.isfinite(flat[f"quant/{layer}/{part}/{s}"]) for s in stats)
        for part in (*tensors, *operands):
            assert sum(metrics.last.histograms[layer][part]) == pytest.approx(1)
    both = [flat[f"quant/{layer}/wgrad/p10_db"] for layer in ("0", "2")]
    assert flat["quant/worst_layer/wgrad/p10_db"] == min(both)
    assert flat["quant/median_layer/wgrad/p10_db"] == pytest.approx(sum(both) / 2)
    scores = {layer: metrics.last.score(layer) for layer in ("0", "2")}
    assert scores["0"] == min(flat[f"quant/0/{p}/{s}"] for p in PRODUCTS for s in ("sqnr_db", "median_db"))
    assert metrics.last.worst_first() == sorted(scores, key=scores.get)
    assert metrics.last.recipes == {"0": "int8", "2": "int8"}


def test_chosen_layers_and_stats():
    model = toy()
    metrics = QuantMetrics(model, layers=["2"], stats=["sqnr_db", "amax"], what_if=[])
    train_step(model, torch.randn(40, 64))
    keys = set(metrics.step())
    assert {key.split("/")[1] for key in keys} == {"2", "sample", "worst_layer", "median_layer"}
    assert {key.split("/")[-1] for key in keys if key.startswith("quant/2/")} == {"sqnr_db", "amax"}


def test_training_is_the_same_with_and_without():
    """Sampling draws no random numbers of the model, changes no gradient and leaves nothing behind between samples."""
    results = []
    for every in (0, 3):
        model = toy("int8")
        model.insert(1, nn.Dropout(0.3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        metrics = QuantMetrics(model, every) if every else None
        sampled = []
        for step in range(1, 8):
            optimizer.zero_grad()
            train_step(model, torch.randn(40, 64))
            optimizer.step()
            if metrics:
                sampled += [step] if metrics.step() else []
                due = (step + 1) % every == 0
                assert all(len(layer.operand_hooks) == due for layer in metrics.layers.values())
        assert sampled == ([1, 3, 6] if metrics else [])
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_resumed_run_keeps_the_rhythm():
    model, sampled = toy(), []
    with QuantMetrics(model, every=4, start_step=6, what_if=[]) as metrics:
        for _ in range(4):
            train_step(model, torch.randn(40, 64))
            if metrics.step():
                sampled.append(metrics.last.step)
    assert sampled == [8]


def test_compiled_model_is_measured_and_compiled_once():
    model, x = toy("int8"), torch.randn(40, 64)
    eager = measure(model, x, what_if=[])
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with QuantMetrics(model, every=2, sample_size=ALL, what_if=[]) as metrics:
        for step in range(1, 7):
            compiled(x).square().mean().backward()
            sampled = metrics.step()
            assert bool(sampled) == (step in (1, 2, 4, 6))
            if sampled:
                assert metrics.last.values == eager
    assert len(compiled_graphs) == 1


class Block(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = toy("int8"), reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    x = torch.randn(40, 64, requires_grad=True)
    block = Block(reentrant)
    expected = measure(block.model, x, what_if=[])
    found = measure(block, x, what_if=[])
    assert {name.removeprefix("model."): v for name, v in found.items()} == expected


def test_accumulated_gradients_autocast_and_validation():
    """The first forward with gradients counts; y in bfloat16 while W stays float32."""
    model, (first, second) = toy("int8"), torch.randn(2, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = measure(model, first, what_if=[])
        with QuantMetrics(model, sample_size=ALL, what_if=[]) as metrics:
            with torch.no_grad():
                model(second * 100)
            train_step(model, first)
            train_step(model, second)
            metrics.step()
    assert metrics.last.values == expected


def test_memory_held_between_forward_and_backward():
    """The bound of docs/metrics.md: M (C (b + 2 R) + 4 R + 24) bytes a layer; C inputs sampled, b bytes of x, R recipes of the three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256))
    convert_to_halo_training(model, recipe="fp8")
    metrics = QuantMetrics(model, what_if=["halo0_fp8", "fp8", "int8"], sample_size=128)
    loss = model(torch.randn(1024, 512)).square().mean()
    assert held(1024, vars(metrics._sampled._pending["0"]), metrics) <= 1024 * (32 * (4 + 2 * 2) + 4 * 2 + 24)
    loss.backward()
    assert not metrics._sampled._pending
    batches = metrics._sampled.batches
    batches._reduce(next(k for k in batches._waiting if k[0] is reduce_wgrad))  # is full
    assert held(1024, metrics) == 1024 * 68  # until step()
    metrics.close()


def held(rows: int, *owners) -> int:
    """Bytes of the tensors with so many rows that a probe and the waiting samples keep."""
    owners = [vars(o._sampled.batches) if isinstance(o, QuantMetrics) else o for o in owners]
    storages = [t.untyped_storage() for t in tensors_of(owners) if rows in t.shape]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Operations(TorchDispatchMode):
    """Counts what would launch a kernel."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.count += not (func.is_view or "empty" in name or name == "promote_types")
        return func(*args, **(kwargs or {}))


def test_few_operations_a_layer(monkeypatch):
    """Launching them is a good part of what a sample costs, and one more a layer is 224 more in that of a Llama-3-8B.

    Emulated products and rotations of a CPU included; on a GPU they are fewer.
    """
    monkeypatch.setattr("halo_train.metrics.step._disable_current_modes", contextlib.nullcontext)

    def operations(layers: int, together: int) -> tuple[int, int]:
        """In a sampled step and in a plain one; so many layers are reduced together."""
        torch.manual_seed(0)
        # The largest sample of a layer has 64 x 64 elements.
        monkeypatch.setattr("halo_train.metrics.batches.FULL", together * 64 * 64)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
        convert_to_halo_training(model, recipe="fp8")
        x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
        counts = []
        with QuantMetrics(model, every=2, sample_size=64) as metrics:
            train_step(model, x)
            metrics.step()  # d is taken in it
            for _ in range(2):  # sampled, then plain
                with Operations() as counted:
                    train_step(model, x)
                    metrics.step()
                counts.append(counted.count)
        return counts[0], counts[1]

    (few, few_plain), (many, many_plain) = operations(2, 100), operations(6, 100)
    alone, _ = operations(4, 1)
    stacked, _ = operations(4, 4)
    a_layer = (many - few - many_plain + few_plain) / 4
    a_stack = (alone - stacked) / 3
    assert a_layer <= 26  # at once
    assert a_stack <= 240  # later, for all layers of a stack: 4 to 16 of a Llama-3-8B


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [t for v in value for t in tensors_of(v)]
        if isinstance(value, (list, tuple, type({}.values())))
        else []
    )


def fsdp_worker(rank: int, port: int, wrap: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(rank))
        everything = torch.cat(
            [torch.randn(40, 64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
        )
        reference = toy(RECIPES["fp8"].with_folded_dgrad)  # a gathered weight has no columns
        with torch.no_grad():
            reference(everything)  # the equalizers of all ranks' tokens
        expected = measure(reference, x, what_if=["int8"])
        model = toy("fp8")
        if wrap == "layers":
            for layer in (model[0], model[2]):
                fully_shard(layer)
        fully_shard(model)
        found = measure(model, x, what_if=["int8"])
        assert list(found) == ["0", "2"]
        for layer in found:
            for part in found[layer]:
                assert found[layer][part] == pytest.approx(expected[layer][part], rel=1e-6), (layer, part)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["root", "layers"])
def test_under_fsdp2(wrap):
    """Each rank measures its own tokens against the gathered weight, also where a layer is an FSDP unit of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(fsdp_worker, args=(port, wrap), nprocs=2)


def test_dropped_in_a_sampled_step_it_leaves_nothing_behind():
    """A loop that never calls close(): no hooks, and torch.compile is on again."""
    model, graphs = toy(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, x = torch.compile(model, backend=backend), torch.randn(40, 64)
    metrics = QuantMetrics(model, every=1)
    train_step(compiled, x)
    assert metrics.step()
    train_step(compiled, x)
    assert not graphs
    del metrics
    assert not any(layer.operand_hooks for _, layer in halo_linears(model))
    train_step(compiled, x)
    assert graphs


def test_refused():
    with pytest.raises(ValueError, match="no HaloLinear; call convert_to_halo_training"):
        QuantMetrics(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(
        ValueError, match=r"layers: '\*.q_proj' matches none of the 2 HaloLinear layers, e.g. '0'"
    ):
        QuantMetrics(toy(), layers=["*.q_proj"])
    with pytest.raises(ValueError, match=r"stats must be out of .* got 'sqnr'; did you mean 'sqnr_db'"):
        QuantMetrics(toy(), stats=["sqnr"])
    with pytest.raises(ValueError, match="recipe must be one of"):
        QuantMetrics(toy(), what_if=["fp9"])
    with pytest.raises(ValueError, match="every must be at least 1"):
        QuantMetrics(toy(), every=0)


def test_a_step_without_backward_is_told():
    metrics = QuantMetrics(toy())
    with pytest.warns(UserWarning, match="no measured layer ran forward and backward"):
        assert metrics.step() == {}
