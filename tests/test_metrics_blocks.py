"""QuantMetrics where gradients have scales for blocks, as on Hopper, with the reference on the CPU: what it measures is what the layers do."""

from __future__ import annotations

import pytest
import torch
from metrics_fixtures import FUSED, assert_measured_as_run, backward_of, block_example, causal_lm, layer_of
from torch import Tensor, nn

from halo_train import (
    RECIPES,
    HaloConfig,
    HaloLinear,
    QuantMetrics,
    convert_to_halo_training,
    hadamard_transform,
    ops,
)
from halo_train.blocks import modules
from halo_train.linear import halo_linears
from halo_train.metrics import sqnr_db
from halo_train.operands import quantize_input, round_weight
from halo_train.products import for_dgrad, for_wgrad, round_gradient
from halo_train.quantize import Equalizer, equalizer_exponents

CONFIGS = {
    "fp8": RECIPES["fp8"],
    "fp8, folded": RECIPES["fp8"].with_folded_dgrad,
    "fp8_plain": RECIPES["fp8_plain"],
}


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_blocks", lambda e: e.dtype != torch.float64)


@pytest.mark.parametrize("recipe", CONFIGS)
@pytest.mark.parametrize("shape", [(300, 528, 272), (700, 48, 272), (256, 64, 33)])
def test_products_have_the_errors_of_the_layers_gradients(recipe, shape):
    x, w, e = block_example(*shape)
    by_columns = recipe != "fp8_plain" and shape[0] <= 4 * shape[1]
    assert_measured_as_run(layer_of(CONFIGS[recipe], x, w), x, e, by_columns, tolerance=0.01)


@pytest.mark.parametrize("own", ["fp8", "fp8, folded", "fp8_plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_operands_have_the_bits_of_those_that_the_layer_rounds(own, dtype):
    """As run and as what-if recipes, of two layers that are reduced together: one other code would show."""
    x, w, e = block_example(600, 320, 528, dtype)
    model = nn.ModuleList(layer_of(CONFIGS.get(own, RECIPES["int8"]), x, part) for part in (w, w.flip(0)))
    x.requires_grad_()
    with QuantMetrics(model, sample_size=64, what_if=list(CONFIGS.values())) as metrics:
        for layer in model:
            layer(x).backward(e)
        (draws,) = metrics._sampled._draws.values()
        metrics.step()
    tokens, outputs, inputs = draws.block(600, 320, 528)
    sampled = {"dgrad": (tokens, inputs), "wgrad": (inputs, outputs)}
    sampled |= {"e_dgrad_operand": (tokens, slice(None)), "e_wgrad_operand": (outputs, slice(None))}
    for layer, parts in zip(model, metrics.last.values.values(), strict=True):
        for config in CONFIGS.values():
            label = "" if config == layer.config else f"@{config.name}"
            with torch.no_grad():
                equalizer = Equalizer.of_exponents(equalizer_exponents(x, layer.weight))
                expected = as_the_layer_rounds(x, layer.weight, e, equalizer, config)
            for part, pair in expected.items():
                if label and part.endswith("operand"):
                    continue
                exact, rounded = (t[sampled[part][0]][:, sampled[part][1]] for t in pair)
                stats = parts[part if part.endswith("operand") else part + label]
                # What a folded W stands for is rotated back in float32.
                tolerance = 1e-3 if part == "dgrad" and not config.requantize_w_dgrad else 1e-8
                whole, rows = sqnr_db(exact, rounded), sqnr_db(exact, rounded, dim=1)
                assert stats["sqnr_db"] == pytest.approx(whole.item(), abs=tolerance), (part, label)
                assert stats["min_db"] == pytest.approx(rows.min().item(), abs=tolerance), (part, label)


def test_what_does_not_depend_on_scales_is_as_with_row_scales(monkeypatch):
    x, w, e = block_example(300, 320, 272)
    found = []
    for in_blocks in (True, False):
        monkeypatch.setattr(ops, "takes_blocks", lambda e, in_blocks=in_blocks: in_blocks)
        layer = layer_of(CONFIGS["fp8, folded"], x, w)
        with QuantMetrics(nn.Sequential(layer), sample_size=100, what_if=[]) as metrics:
            layer(x.requires_grad_()).backward(e)
            metrics.step()
        found.append(metrics.last)
    blocks, rows = found
    for part in ("e", "e_dgrad_operand", "e_wgrad_operand"):
        assert blocks.histograms["0"][part] == rows.histograms["0"][part]
        assert blocks.values["0"][part]["sqnr_db"] != rows.values["0"][part]["sqnr_db"]
        for stat in ("amax", "rms", "kurtosis", "row_outliers", "column_outliers"):
            assert blocks.values["0"][part][stat] == pytest.approx(rows.values["0"][part][stat], rel=1e-12)


def as_the_layer_rounds(
    x: Tensor, weight: Tensor, e: Tensor, equalizer: Equalizer, config: HaloConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """dX, dW^T and both operands E, exact and by the functions of a layer's forward and backward, multiplied in float64."""
    (m, n), k = e.shape, x.shape[1]
    d, inverse = equalizer if config.equalize else (None, None)
    by_columns = config.rotate_k
    of_x, of_w = quantize_input(x, inverse, config), round_weight(weight, d, config)
    kept = for_wgrad(x, of_x, d, by_columns, config)
    saved = for_dgrad(weight, *of_w.rows, None, config)
    for_dx, for_dw, _ = (
        None if q is None else q.dequantize().double()
        for q in round_gradient(e, saved, kept.scale, True, True, None, config, by_columns)
    )
    dx = for_dx @ (of_w.rows.data if of_w.columns is None else of_w.columns.dequantize().t()).double()
    if not config.requantize_w_dgrad and config.rotate_k:
        dx = hadamard_transform(dx) * inverse
    dw = for_dw @ (kept.quantized.dequantize().t() if by_columns else kept.data).double()
    fold = saved.fold(config, n)
    return {
        "dgrad": (e.double() @ weight.double(), dx[:m, :k]),
        "wgrad": (x.double().t() @ e.double(), dw.t()[:k, :n]),
        "e_dgrad_operand": ((e if fold is None else e * fold).double(), for_dx[:m, :n]),
        "e_wgrad_operand": ((e * kept.scale[:m, None]).t().double(), for_dw[:n, :m]),
    }


def test_row_scales_where_the_layer_makes_one_gradient_alone():
    x, w, e = block_example(300, 320, 272)
    found = []
    for in_blocks, x_needs, w_needs in ((True, True, False), (True, False, True), (False, True, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "takes_blocks", lambda e, in_blocks=in_blocks: in_blocks)
            layer = layer_of("fp8", x, w)
            layer.weight.requires_grad_(w_needs)
            with QuantMetrics(nn.Sequential(layer)) as metrics:
                layer(x.detach().requires_grad_(x_needs)).backward(e)
                metrics.step()
            found.append(metrics.last.values)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_forms_are_those_of_the_autograd_functions(family, fuse, monkeypatch):
    """Of fused blocks, too: there k has its columns together with q, and down and what reads a LayerNorm have none."""
    model, taken, measured, of_mlps = causal_lm(family), {}, {}, []
    convert_to_halo_training(model, recipe="fp8", fuse=fuse)

    def note(layer: HaloLinear, x: Tensor, y: Tensor, _: int) -> None:
        (form,) = metrics._sampled._pending[layer.fqn]._plan.forms
        taken[layer.fqn], measured[layer.fqn] = y.grad_fn.by_columns, form.by_columns
        assert form.in_blocks

    with QuantMetrics(model, what_if=[]) as metrics:
        handles = [layer.register_operand_hook(note) for _, layer in halo_linears(model)]
        backward_of(model, (3, 50))
        assert metrics.step()
    assert measured == taken
    assert taken.keys() == metrics.layers.keys()
    if family == "llama":
        assert taken["model.layers.0.self_attn.k_proj"] is fuse
        assert taken["model.layers.0.mlp.down_proj"] is not fuse
    for handle in handles:
        handle.remove()
    gated_mlp = modules.halo_gated_mlp
    monkeypatch.setattr(
        modules, "halo_gated_mlp", lambda *a, **b: of_mlps.append(gated_mlp(*a, **b)) or of_mlps[-1]
    )
    backward_of(model, (3, 50))
    gate = [form for name, form in measured.items() if "gate" in name]
    assert [y.grad_fn.by_columns for y in of_mlps] == (gate if fuse else [])


def test_a_sampled_step_of_a_fused_block_rounds_what_a_plain_one_does():
    """h in it is a tensor: of float32 the same values, which down reads by its rows as ever."""
    model, gradients = causal_lm("llama"), []
    convert_to_halo_training(model, recipe="fp8")
    with QuantMetrics(model, every=3) as metrics:
        for _ in range(3):
            model.zero_grad()
            backward_of(model, (3, 50))
            metrics.step()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[1].items():
        assert sqnr_db(plain, gradients[2][name]) > 60, name
