"""The output layer in 8 bits inside the chunked loss: its algebra in float64, that it rounds, and who is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_training_loss import FAMILIES, SMALL, build, gradients
from torch import nn
from training_fixtures import write_run

from halo_train import (
    RECIPES,
    HaloConfig,
    HaloLinear,
    QuantMetrics,
    convert_to_halo_training,
    measure_products,
    revert,
)
from halo_train.training import output_layer
from halo_train.training.config import load_config
from halo_train.training.data import IGNORE
from halo_train.training.loss import LinearCrossEntropy, LogitMap, TokenLoss
from halo_train.training.output_layer import RoundedProducts, rounding_of
from halo_train.training.precision import convert

ROUNDING = [name for name in RECIPES if name != "bf16"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 96, (3, 17), generator=generator)
    labels = torch.where(torch.rand(3, 17, generator=generator) < 0.5, ids, IGNORE)
    return ids, labels


def head_of(model: nn.Module) -> HaloLinear:
    return model.get_output_embeddings()


def convert_head(model: nn.Module, config) -> None:
    head = model.get_output_embeddings()
    convert_to_halo_training(model, recipe=config, module_filter_fn=lambda layer, _: layer is head)


@pytest.mark.parametrize("first", ["the loss", "the conversion"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_unrounded_it_is_the_models_own_loss(name: str, first: str) -> None:
    model = build(name)
    ids, labels = batch()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    (expected / 7).backward()
    reference = dict(gradients(model))

    config = RECIPES["fp8"].without_rounding()
    if first == "the conversion":
        convert_head(model, config)
    loss = TokenLoss(model, max_logits=5 * 96)
    if first == "the loss":
        convert_head(model, config)
    assert loss.whole_logits is None
    value = loss(ids, labels)
    (value / 7).backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    found = dict(gradients(model))
    assert found.keys() == reference.keys()
    for parameter, grad in reference.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[parameter], grad, rtol=0, atol=1e-6 * scale, msg=parameter)


@pytest.mark.parametrize(
    ("recipe", "frozen"),
    [
        *((recipe, ()) for recipe in ROUNDING),
        *(("fp8", frozen) for frozen in (("h",), ("w",), ("b",), ("h", "w"))),
    ],
)
def test_unrounded_in_float64(recipe: str, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    head = HaloLinear(12, 7, dtype=torch.float64, recipe=RECIPES[recipe].without_rounding())
    h = torch.randn(5, 12, dtype=torch.float64, requires_grad="h" not in frozen)
    targets = torch.randint(7, (5,))
    head.weight.requires_grad_("w" not in frozen)
    head.bias.requires_grad_("b" not in frozen)
    rounding = rounding_of(head, h)
    assert head.equalizer_taken == head.config.equalize
    assert torch.autograd.gradcheck(
        lambda h, w, b: LinearCrossEntropy.apply(h, w, b, targets, LogitMap(0.5, 3.0), 2, rounding),
        (h, head.weight, head.bias),
    )


@pytest.mark.parametrize("recipe", ROUNDING)
def test_one_chunk_is_the_layer_by_itself(recipe: str) -> None:
    """In float64, so that nothing but the 8 bits is rounded; the loss is not scaled, which would move the rounding."""
    torch.manual_seed(0)
    head = HaloLinear(48, 83, dtype=torch.float64, recipe=recipe)
    h = torch.randn(35, 48, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(83, (35,))
    leaves = (h, head.weight, head.bias)
    expected = F.cross_entropy(head(h), targets, reduction="sum")
    reference = torch.autograd.grad(expected, leaves)
    loss = LinearCrossEntropy.apply(*leaves, targets, LogitMap(), 64, rounding_of(head, h))
    torch.testing.assert_close(loss, expected)
    for found, grad in zip(torch.autograd.grad(loss, leaves), reference, strict=True):
        torch.testing.assert_close(found, grad)
    exact = F.cross_entropy(F.linear(h, head.weight, head.bias), targets, reduction="sum")
    assert loss.item() != pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_model_whose_output_layer_is_converted_runs_it_in_8_bits(recipe: str) -> None:
    """The loss was made before the conversion, as the recipes do, and would not notice another layer."""
    model = build("llama").float()
    loss, (ids, labels) = TokenLoss(model, max_logits=5 * 96), batch()
    with torch.no_grad():
        exact = loss(ids, labels).item()
        convert_to_halo_training(model, recipe=recipe, output_layer=True)
        rounded = loss(ids, labels).item()
        assert head_of(model).equalizer_taken
        layers = copy.deepcopy(model)
        layers.lm_head = revert(layers.lm_head)
        without = TokenLoss(layers, max_logits=5 * 96)(ids, labels).item()
    assert rounded != without
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_kept_weight_gives_the_same_bits() -> None:
    model = build("llama").float()
    convert_to_halo_training(model, output_layer=True)
    loss, (ids, labels) = TokenLoss(model, max_logits=5 * 96), batch()
    steps = []
    for _ in range(3):  # the weight is kept from the second on
        before = head_of(model).weight.grad
        before = 0 if before is None else before.clone()
        loss(ids, labels).backward()
        steps.append(head_of(model).weight.grad - before)
    assert head_of(model)._weight_cache._value is not None
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps[2], steps[0], rtol=1e-4, atol=1e-5)


def test_no_trained_token() -> None:
    model = build("llama").float()
    convert_to_halo_training(model, output_layer=True)
    loss, (ids, labels) = TokenLoss(model), batch()
    loss(ids, labels)
    value = loss(ids, torch.full_like(ids, IGNORE))
    value.backward()
    assert value.item() == 0
    assert not any(grad.any() for _, grad in gradients(model))


def test_its_errors_are_measured_without_a_trace() -> None:
    model = build("llama").float()
    convert_to_halo_training(model, recipe="int8", output_layer=True, fuse=False)
    loss, (ids, labels) = TokenLoss(model, max_logits=5 * 96), batch()
    with torch.no_grad():
        loss(ids, labels)
    loss(ids, labels).backward()
    plain = dict(gradients(model))

    errors = measure_products(model, lambda: loss(ids, labels).backward())
    assert errors["lm_head"]["fprop"].sqnr_db > 35
    assert errors["lm_head"]["wgrad"].sqnr_db > 25
    model.zero_grad()
    with QuantMetrics(model, every=1, what_if=()) as metrics:
        loss(ids, labels).backward()
        values = metrics.step()
    assert "quant/lm_head/dgrad/sqnr_db" in values
    for name, grad in gradients(model):
        assert torch.equal(grad, plain[name]), name


def test_the_report_says_so() -> None:
    tied = transformers.Qwen2Config(**SMALL, tie_word_embeddings=True)
    for config in (transformers.LlamaConfig(**SMALL), tied):
        model = transformers.AutoModelForCausalLM.from_config(config)
        report = convert_to_halo_training(model, output_layer=True)
        assert [layer.name for layer in report.converted][-1] == "lm_head"
        assert head_of(model).tied == config.tie_word_embeddings
        assert head_of(model).weight is model.lm_head.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_int8_would_lose_probabilities() -> None:
    """Of 512 words; 96 are told apart."""
    for words, name in ((512, "fp8, fast_accum=False"), (96, "int8")):
        config = transformers.LlamaConfig(**{**SMALL, "vocab_size": words})
        model = transformers.AutoModelForCausalLM.from_config(config)
        report = convert_to_halo_training(model, recipe="int8", output_layer=True)
        assert {layer.recipe for layer in report.converted[:-1]} == {"int8"}
        assert report.converted[-1].recipe == name
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 512})
    )
    with pytest.raises(ValueError, match="lm_head is an output layer of 512 words"):
        convert_to_halo_training(model, recipe="int8", module_filter_fn=lambda *_: True)


def test_the_field_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(write_run(tmp_path), ["quant.output_layer=true", "quant.recipe=int8"])
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 512})
    )
    convert(model, {"*": RECIPES["int8"]}, config, tmp_path)
    assert "8 linear layers run int8 (7 int8, 1 fp8, fast_accum=False)" in capsys.readouterr().out
    assert head_of(model).config == HaloConfig(fast_accum=False)


def test_what_cannot_be_converted_is_an_error() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=r"let module_filter_fn return True"):
        convert_to_halo_training(model, output_layer=True, module_filter_fn=lambda *_: True)
    with pytest.raises(
        ValueError, match=r"recipe for the output layer 'lm_head'; no pattern of '\*mlp\*' matches it"
    ):
        convert_to_halo_training(model, output_layer=True, recipe={"*mlp*": "fp8"})
    assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(ValueError, match=r"output_layer=True needs .* none was found"):
        convert_to_halo_training(model.model, output_layer=True)

    class Own(nn.Linear):
        pass

    model.lm_head = Own(32, 96)
    with pytest.raises(ValueError, match=r"lm_head: Own is a subclass of nn\.Linear"):
        convert_to_halo_training(model, output_layer=True)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "vocabulary"), [(48, 96), (41, 96), (48, 90), (41, 90)])
@pytest.mark.parametrize("recipe", ["fp8", "int8", "halo2_int8"])
def test_a_gradient_written_over_the_logits_is_not_copied_to_be_padded(
    recipe: str, tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = HaloLinear(32, vocabulary, bias=False, recipe=recipe)
    h, dz, results, padded = torch.randn(tokens, 32), torch.randn(tokens, vocabulary), [], []
    round_gradient = output_layer.round_gradient

    def look(e: torch.Tensor, *others: Any) -> Any:
        padded.append((e.shape[0] % 16, e.shape[1] % 16) == (0, 0))
        return round_gradient(e, *others)

    monkeypatch.setattr(output_layer, "round_gradient", look)
    for over in (False, True):
        products = RoundedProducts(head.weight, None, h.dtype, rounding_of(head, h), True, True)
        z = products.logits(h)
        gradient = products.gradient(z.copy_(dz) if over else dz)
        products.add_wgrad(gradient)
        results.append((products.dgrad(gradient), products.wgrad_sum()))
    assert padded[1]
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other)
