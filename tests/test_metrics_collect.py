"""QuantMetrics in any training loop: no trace between samples, compiled, fused, checkpointed and accumulated steps."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from metrics_fixtures import ALL, FUSED, backward_of, capture, causal_lm, measure, toy, train_step
from torch import nn
from torch.utils.checkpoint import checkpoint

from halo_train import RECIPES, HaloLinear, QuantMetrics, convert_to_halo_training
from halo_train.fused import Projected
from halo_train.linear import halo_linears
from halo_train.metrics import PRODUCTS
from halo_train.metrics import step as step_module
from halo_train.metrics.statistics import STATS_OF


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

    def show(layer, x, y, _):
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


@pytest.mark.parametrize("mode", ["selective", "full", "mlp"])
def test_fused_blocks_that_recompute(mode):
    from halo_train.training.blocks import checkpoint_activations

    found = []
    for recompute in (False, True):
        model = causal_lm("llama")
        of_config = "mlp" if recompute and mode == "mlp" else "nothing"
        convert_to_halo_training(model, recipe="fp8", recompute=of_config)
        if recompute and mode != "mlp":
            checkpoint_activations(model, mode)
        with QuantMetrics(model, every=1, what_if=["int8"]) as metrics:
            for _ in range(2):
                backward_of(model)
                metrics.step()
        found.append((metrics.last.values, [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("recipe", ["fp8", "fp8_plain", "halo1_int8"])
def test_what_several_layers_read_is_rounded_once(recipe, monkeypatch):
    """And gives each of them what it would have measured alone."""
    made = []
    probe = step_module.InputProbe

    def count(*args):
        made.append(args)
        return probe(*args)

    monkeypatch.setattr(step_module, "InputProbe", count)
    found = []
    for alone in (False, True):
        model = causal_lm("llama")
        convert_to_halo_training(model, recipe=recipe)
        if alone:
            monkeypatch.setattr(step_module, "_Read", lambda *_: None)
        made.clear()
        with QuantMetrics(
            model, what_if=["int8", "halo1_fp8"] if recipe == "fp8" else ["halo1_fp8"]
        ) as metrics:
            backward_of(model)
            metrics.step()
        # q, k and v; o; gate and up; down.
        assert len(made) == (14 if alone else 8)
        found.append(metrics.last)
    assert found[0].values == found[1].values
    assert found[0].histograms == found[1].histograms


@pytest.mark.parametrize(("recipe", "written"), [("fp8", False), ("halo1_fp8", True)])
def test_an_input_that_was_written_to_or_has_other_factors_is_rounded_again(recipe, written):
    """In one storage, and in two layers that took their factors apart."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)
            self.b.weight.data.mul_(torch.exp(torch.randn(64)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            if written:
                with torch.no_grad():
                    x.mul_(3)
            return (first * self.b(x)).sum()

    model, data, seen = Twice(), torch.randn(48, 64), {}
    convert_to_halo_training(model, recipe=recipe)
    handle = model.b.register_operand_hook(lambda _, x, *rest: seen.update(x=x.clone()))
    with QuantMetrics(model, every=1) as metrics:
        model(data.clone()).backward()
        metrics.step()
        together = metrics.last.values["b"]
        handle.remove()
    assert together["x"]["amax"] == pytest.approx((3 if written else 1) * data.abs().max().item())
    with QuantMetrics(model, every=1) as metrics:
        model.b(seen["x"]).sum().backward()
        metrics.step()
    apart = metrics.last.values["b"]
    for part in ("x", "x_operand", "fprop", "fprop@int8"):
        assert together[part] == apart[part], part


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


def test_two_models_in_one_loop():
    """Both sampled in the same steps: eager until both are read, compiled after."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    models = [toy(), toy()]
    compiled = [torch.compile(model, backend=backend) for model in models]
    metrics = [QuantMetrics(model, every=3, what_if=[]) for model in models]
    for step in range(1, 5):
        for model in compiled:
            train_step(model, torch.randn(40, 64))
        assert [bool(m.step()) for m in metrics] == 2 * [step in (1, 3)]
        assert bool(graphs) == (step > 1)


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
    with pytest.raises(
        TypeError, match=r"layers must be a sequence of names; got the string '\*'; write \['\*'\]"
    ):
        QuantMetrics(toy(), layers="*")
    with pytest.raises(TypeError, match=r"what_if must be a sequence of names; got the string 'int8'"):
        QuantMetrics(toy(), what_if="int8")
    with pytest.raises(TypeError, match=r"every must be an integer, a number of steps; got '50'"):
        QuantMetrics(toy(), every="50")
    for sinks in (print, [3]):
        with pytest.raises(TypeError, match="sinks must be a sequence of callables"):
            QuantMetrics(toy(), sinks=sinks)


def test_one_token():
    """Statistics that compare rows are undefined, without a warning of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = measure(toy("fp8"), torch.randn(1, 64))["0"]
    assert math.isnan(values["x"]["row_outliers"])
    assert math.isfinite(values["fprop"]["sqnr_db"])


def test_a_step_without_backward_is_told():
    metrics = QuantMetrics(toy())
    with pytest.warns(UserWarning, match="no measured layer ran forward and backward"):
        assert metrics.step() == {}
