"""The chunked loss against logits of the models' own forward, in float64, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from halo_train.training.data import IGNORE
from halo_train.training.loss import (
    LinearCrossEntropy,
    LogitMap,
    TokenLoss,
    measure_logit_map,
)

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# name -> (config class, fields, what happens to the products of the output layer)
FAMILIES = {
    "llama": ("LlamaConfig", {}, LogitMap()),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}, LogitMap()),
    "phi, bias of the output layer": ("PhiConfig", {}, LogitMap()),
    "gemma2, tied, capped": ("Gemma2Config", {"final_logit_softcapping": 0.5}, LogitMap(1.0, 0.5)),
    "granite divides": ("GraniteConfig", {"logits_scaling": 8.0}, LogitMap(0.125)),
    "hyperclova multiplies by the same name": (
        "HyperCLOVAXConfig",
        {"logits_scaling": 8.0},
        LogitMap(8.0),
    ),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}, LogitMap(0.25)),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}, LogitMap()),
}


def build(name: str) -> nn.Module:
    kind, fields, _ = FAMILIES[name]
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**{**SMALL, **fields}),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    # Larger weights than the usual 0.02, so that a cap or a factor has something to change.
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.double().train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 96, (3, 17), generator=generator)
    labels = torch.where(torch.rand(3, 17, generator=generator) < 0.5, ids, IGNORE)
    labels[2] = IGNORE
    return ids, labels


def gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, p in model.named_parameters():
        if p.grad is not None:
            yield name, p.grad.clone()
            p.grad = None


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name, batch) -> None:
    model = build(name)
    ids, labels = batch
    loss = TokenLoss(model, max_logits=5 * 96)  # chunks of five tokens
    assert loss.whole_logits is None
    assert loss.logit_map == pytest.approx(FAMILIES[name][2])

    value = loss(ids, labels)
    (value / 7).backward()
    found = dict(gradients(model))
    logits = model(input_ids=ids, use_cache=False).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (expected / 7).backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)  # rotary embeddings are float32
    reference = dict(gradients(model))
    assert found.keys() == reference.keys()
    for parameter, grad in reference.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[parameter], grad, rtol=0, atol=1e-6 * scale, msg=parameter)
    with torch.no_grad():
        assert loss(ids, labels).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("frozen", [(), ("h",), ("w",), ("b",), ("h", "w")])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(0.5, 3.0)])
def test_function_in_float64(frozen, logit_map) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=name not in frozen)
        for name, shape in {"h": (11, 8), "w": (13, 8), "b": (13,)}.items()
    }
    targets = torch.randint(13, (11,), generator=generator)
    assert torch.autograd.gradcheck(
        lambda h, w, b: LinearCrossEntropy.apply(h, w, b, targets, logit_map, 4), tuple(tensors.values())
    )


def test_no_trained_token_gives_zero_and_zero_gradients() -> None:
    model = build("llama")
    ids = torch.ones(2, 8, dtype=torch.int64)
    value = TokenLoss(model)(ids, torch.full_like(ids, IGNORE))
    value.backward()
    assert value.item() == 0
    assert not any(grad.any() for _, grad in gradients(model))


def test_in_bfloat16_it_is_as_good_as_the_whole_logits(batch) -> None:
    model = build("llama")
    ids, labels = batch
    TokenLoss(model)(ids, labels).backward()
    exact = dict(gradients(model))
    model.float()
    errors = []
    for max_logits, whole in ((96, False), (1 << 20, False), (1, True)):
        loss = TokenLoss(model, max_logits)
        if whole:
            loss.logit_map = None
        loss(ids, labels).backward()
        error = [((grad - exact[name]).norm() / exact[name].norm()).item() for name, grad in gradients(model)]
        errors.append(max(error))
    assert max(errors[:2]) < 1.2 * errors[2] < 0.05


def test_logits_never_exist_as_a_whole() -> None:
    """512 tokens, 4096 words: the largest tensor of float32 elements is a chunk's or the weight's gradient."""
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    h = torch.randn(512, 16, requires_grad=True)
    weight = torch.randn(4096, 16, requires_grad=True)
    with Watch():
        LinearCrossEntropy.apply(h, weight, None, torch.zeros(512, dtype=torch.int64), LogitMap(), 32)
    assert max(sizes) == 32 * 4096


def test_an_unknown_way_to_the_logits_is_left_to_the_model(batch) -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(96)
            return out

    model = Shifted(transformers.LlamaConfig(**SMALL)).double()
    loss = TokenLoss(model)
    assert loss.whole_logits == "it changes its logits by more than a factor and a soft cap"
    ids, labels = batch
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    assert loss(ids, labels).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("OPTConfig", "does not get the last hidden states as they are"),
        ("MiniCPM3Config", "does not get the last hidden states as they are"),  # it divides them first
    ],
)
def test_hidden_states_that_are_changed_first(kind, reason) -> None:
    config = getattr(transformers, kind)(**SMALL)
    with pytest.raises(ValueError, match=reason):
        measure_logit_map(transformers.AutoModelForCausalLM.from_config(config))


def test_measuring_leaves_the_model_alone_and_works_without_weights() -> None:
    config = transformers.Gemma2Config(**SMALL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert measure_logit_map(model) == LogitMap(1.0, 30.0)
    assert "forward" not in vars(model.base_model)
    assert "forward" not in vars(model.get_output_embeddings())
