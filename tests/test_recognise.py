"""Blocks of transformers that run fused: the values of the layers one by one, whatever stands around them; and those left alone."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from halo_train import (
    RECIPES,
    HaloConfig,
    HaloLinear,
    convert_to_halo_training,
    equalizer_state_dict,
    load_equalizer_state_dict,
    revert,
)
from halo_train.blocks.modules import FusedModule, HaloGatedMLP
from halo_train.config import Recompute
from halo_train.convert import ConversionReport
from halo_train.linear import halo_linears
from halo_train.training.blocks import checkpoint_activations

transformers = pytest.importorskip("transformers")

FIELDS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3", "Phi"]
PARTS = {"Phi": 1}
"""That run fused in a block; 3 in the others."""
IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def build(kind: str = "Llama", **fields: Any) -> nn.Module:
    transformers.set_seed(0)
    config = getattr(transformers, f"{kind}Config")(**FIELDS | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():  # norms of ones would hide what they do
        if parameter.dim() == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model


def convert(
    model: nn.Module, recipe: str | HaloConfig = "fp8", **arguments: Any
) -> tuple[nn.Module, ConversionReport]:
    return model, convert_to_halo_training(model, recipe=recipe, **arguments)


def step(model: nn.Module, ids: Tensor = IDS) -> list[Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def twin_of(model: nn.Module, kind: str, recipe: Any, **fields: Any) -> nn.Module:
    """The same weights and factors, layers one by one."""
    twin, _ = convert(build(kind, **fields), recipe, fuse=False)
    twin.load_state_dict(model.state_dict())
    load_equalizer_state_dict(twin, equalizer_state_dict(model))
    return twin


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[op.name().removeprefix("halo_train::")] += 1
        return op(*args, **(kwargs or {}))


def runs_fused(model: nn.Module) -> tuple[int, int]:
    """Norms and MLPs whose output is rounded where it is made, in one forward."""
    with Count() as count, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return count.ops["norm_quantize"], count.ops["gated_quantize"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_without_rounding_a_model_is_what_it_was(kind: str) -> None:
    exact = step(build(kind))
    for recipe in ("fp8", "fp8_plain"):
        model, report = convert(build(kind), RECIPES[recipe].without_rounding())
        assert len(report.fused) == 2 * PARTS.get(kind, 3)
        assert not report.unfused
        for mine, true in zip(step(model), exact, strict=True):
            assert relative(mine, true) < 5e-6


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_rounded_it_is_the_layers_one_by_one(kind: str, recipe: str) -> None:
    model, _ = convert(build(kind), recipe)
    step(model)
    twin = twin_of(model, kind, recipe)
    assert runs_fused(twin) == (0, 0)
    assert runs_fused(model) == ({"Phi": 2}.get(kind, 4), 0 if kind in PARTS else 2)
    # The halves of Phi-3's gate_up_proj have column scales of their own in dgrad.
    bound = 0.04 if kind == "Phi3" else 5e-3
    for mine, other in zip(step(model), step(twin), strict=True):
        assert relative(mine, other) < bound


def test_the_first_batch_takes_one_vector_of_factors_and_is_fused_too() -> None:
    model, _ = convert(build())
    with Count() as count:
        first = step(model)
    assert (count.ops["norm_quantize"], count.ops["gated_quantize"]) == (4, 2)
    for layer in model.model.layers:
        q, k, v = (getattr(layer.self_attn, f"{name}_proj") for name in "qkv")
        assert torch.equal(q.equalizer_exponent, k.equalizer_exponent)
        assert torch.equal(q.equalizer_exponent, v.equalizer_exponent)
        assert q.equalizer_exponent.any()
        assert layer.mlp.down_proj.equalizer_exponent.any()
    for mine, again in zip(first, step(model), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_bfloat16_models_and_autocast(kind: str) -> None:
    for cast in (True, False):
        model, _ = convert(build(kind) if cast else build(kind).bfloat16(), "int8")
        exact = step(build(kind))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            step(model)
            assert runs_fused(model) == (4, 2)
            loss, grad = step(model)
        assert relative(loss, exact[0]) < 0.01
        assert relative(grad, exact[1]) < 0.08


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Phi", marks=pytest.mark.slow)])
def test_one_graph_for_all_blocks_with_the_same_bits(kind: str) -> None:
    model, _ = convert(build(kind))
    with torch.no_grad():
        model(input_ids=IDS)  # the factors
    expected = step(model)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    for mine, eager in zip(step(model), expected, strict=True):
        assert torch.equal(mine, eager)
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_compiled_from_the_first_batch_and_recomputed() -> None:
    torch._dynamo.reset()
    model, expected = convert(build())[0], step(convert(build())[0])
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    block = model.model.layers[0]
    x = torch.randn(2, 12, 64, requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(12)[None])
    run = torch.compile(
        lambda x: checkpoint(block.forward, x, position_embeddings=rotary, use_reentrant=False),
        backend="aot_eager",
        fullgraph=True,
    )
    grads = [torch.autograd.grad(f(x).square().sum(), [x, *block.parameters()]) for f in (run, partial(block.forward, position_embeddings=rotary))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Phi3"])
def test_keeping_less_gives_the_same_bits(kind: str) -> None:
    """From the first batch on, in micro-batches of which the later ones find rounded weights, and with hooks on the operands."""
    found = []
    for recompute in Recompute:
        model, _ = convert(build(kind), recompute=recompute)
        losses = []
        for ids in (IDS, IDS.flip(0), IDS.flip(1)):
            if len(losses) == 2:
                for _, layer in halo_linears(model):
                    layer.register_operand_hook(lambda *_: None)
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
        found.append([*losses, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("recompute", ["nothing", "mlp"])
@pytest.mark.parametrize("mode", ["selective", "full", "transformers"])
def test_recomputing_gives_the_same_bits_from_the_first_batch(mode: Any, recompute: str) -> None:
    expected = [step(model) for model in [convert(build())[0]] for _ in range(2)]
    model, _ = convert(build(), recompute=recompute)
    if mode == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        checkpoint_activations(model, mode)
    for want in expected:
        assert all(torch.equal(a, b) for a, b in zip(step(model), want, strict=True))


def test_gradients_accumulate() -> None:
    model, other = (convert(build())[0] for _ in range(2))
    parts = [step(model, ids)[1] for ids in (IDS, IDS.flip(1), IDS.flip(0))]
    for ids in (IDS, IDS.flip(1), IDS.flip(0)):
        other(input_ids=ids, labels=ids).loss.backward()
    assert any(m._weight_cache._value is not None for m in other.modules() if isinstance(m, HaloLinear))
    assert relative(torch.cat([p.grad.flatten() for p in other.parameters()]), sum(parts)) < 1e-6


def test_frozen_weights() -> None:
    model, _ = convert(build())
    step(model)
    twin = twin_of(model, "Llama", "fp8")
    for each in (model, twin):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("k_proj" in name or "up_proj" in name or "norm" in name)
    for mine, other in zip(step(model), step(twin), strict=True):
        assert relative(mine, other) < 5e-3


def test_generation_and_no_tokens_at_all() -> None:
    model, _ = convert(build())
    step(model)
    twin = twin_of(model, "Llama", "fp8")
    prompt = IDS[:, :4]
    texts = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, twin)]
    assert torch.equal(*texts)
    fresh, _ = convert(build())
    block = fresh.model.layers[0]
    nothing = torch.zeros(2, 0, 64)
    assert block.mlp(block.post_attention_layernorm(nothing)).shape == (2, 0, 64)
    assert block.self_attn.q_proj(block.input_layernorm(nothing)).shape == (2, 0, 64)
    assert runs_fused(fresh) == (4, 2)


@pytest.mark.parametrize("where", ["q_proj", "gate_proj", "self_attn", "input_layernorm", "mlp"])
def test_hooks_see_tensors(where: str) -> None:
    """As metrics do: a forward in which someone looks runs the layers one by one, the others of the model as ever."""
    model, _ = convert(build())
    before = step(model)
    seen: list[Any] = []
    target = next(m for name, m in model.named_modules() if name.endswith(f"layers.0.{where}") or (name.startswith("model.layers.0") and name.endswith(where)))  # fmt: skip
    handle = target.register_forward_hook(lambda _, args, kwargs, y: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True)  # fmt: skip
    watched = step(model)
    assert all(type(x) is Tensor for x in seen)
    assert len(seen) == 1
    for mine, other in zip(watched, before, strict=True):
        assert relative(mine, other) < 5e-3
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(step(model), before, strict=True))


def test_reading_what_was_not_computed_is_an_error() -> None:
    model, _ = convert(build())
    step(model)
    handed_on = model.model.layers[0].input_layernorm(torch.randn(1, 3, 64))
    assert handed_on.shape == (1, 3, 64)
    with pytest.raises(TypeError, match=r"for 3 other layers only.*fuse=False"):
        model.model.layers[0].self_attn.o_proj(handed_on)
    with pytest.raises(TypeError):
        handed_on + 1
    with pytest.raises(TypeError):
        nn.functional.linear(handed_on, torch.ones(3, 64))


@pytest.mark.parametrize("order", ["peft first", "convert first"])
def test_adapters_run_unfused(order: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    model = build()
    if order == "peft first":
        model = peft.get_peft_model(model, lora)
        report = convert(model)[1]
        reasons = {part.name.rpartition(".")[2]: part.reason for part in report.unfused}
        assert "gate_proj is peft.tuners.lora.layer.Linear, not HaloLinear" in reasons["mlp"]
        assert "q_proj is peft.tuners.lora.layer.Linear" in reasons["input_layernorm"]
        assert not report.fused
    else:
        assert len(convert(model)[1].fused) == 6
        model = peft.get_peft_model(model, lora)
    assert runs_fused(model) == (0, 0)
    step(model)


def replaced_act(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


class OtherMLP(transformers.models.llama.modeling_llama.LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def subclass_of_mlp(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.__class__ = OtherMLP


def extra_norm(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, nn.RMSNorm(64))


def own_forward(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.forward = lambda x: x


def hooked(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "part", "reason"),
    [
        (replaced_act, "mlp", "its activation ReLU is none of silu, gelu, gelu_tanh"),
        (subclass_of_mlp, "mlp", r"test_recognise\.OtherMLP is not transformers\..*\.LlamaMLP"),
        (extra_norm, "post_attention_layernorm", r"Sequential is not transformers\..*\.LlamaRMSNorm"),
        (own_forward, "input_layernorm", "its forward is overridden on the instance"),
        (hooked, "input_layernorm", "v_proj has hooks, or a forward of its own"),
    ],
)
def test_a_block_that_only_looks_like_a_known_one(change: Any, part: str, reason: str) -> None:
    model, exact = build(), build()
    change(model)
    change(exact)
    _, report = convert(model, RECIPES["fp8"].without_rounding())
    found = [left for left in report.unfused if left.name == f"model.layers.0.{part}"]
    assert len(found) == 1
    assert re.search(reason, found[0].reason)
    assert f"model.layers.0.{part}" in str(report)
    assert len(report.fused) + len(report.unfused) == 6
    for mine, true in zip(step(model), step(exact), strict=True):
        assert relative(mine, true) < 5e-6


def test_other_reasons() -> None:
    def reasons(model: nn.Module, recipe: Any = "fp8", **arguments: Any) -> dict[str, str]:
        return {
            p.name.removeprefix("model.layers.0."): p.reason
            for p in convert(model, recipe, **arguments)[1].unfused
        }

    assert "biases of gate and up are not fused" in reasons(build(mlp_bias=True))["mlp"]
    assert "mlp, which reads it, is not fused" in reasons(build(mlp_bias=True))["post_attention_layernorm"]
    assert "one scale for a whole tensor" in reasons(build(), "halo1_fp8")["mlp"]
    assert (
        "rotates gradients"
        in reasons(build(), HaloConfig(requantize_w_dgrad=False, rotate_m_dgrad=True))["mlp"]
    )
    mixed = reasons(build(), {"*.k_proj": "int8", "*.up_proj": "fp8_plain", "*": "fp8"})
    assert "q_proj, k_proj, v_proj have different recipes: fp8, int8" in mixed["input_layernorm"]
    assert "different recipes: fp8, fp8_plain" in mixed["mlp"]
    partly = reasons(build(), module_filter_fn=lambda _, name: "v_proj" not in name)
    assert "v_proj is torch.nn.modules.linear.Linear, not HaloLinear" in partly["input_layernorm"]
    narrow = reasons(build(hidden_size=40, head_dim=10))
    assert "must be a multiple of 16; it is (40,)" in narrow["input_layernorm"]
    assert "mlp" not in narrow
    assert reasons(build(), fuse=False) == {}


class Lookalike(nn.Module):
    """Its layers are called as a gated MLP's are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() + self.up_proj(x))


def test_an_unknown_module_is_reported() -> None:
    _, report = convert(nn.Sequential(Lookalike()))
    assert [(part.name, "none of the known blocks" in part.reason) for part in report.unfused] == [
        ("0", True)
    ]


def test_revert_gives_back_the_classes() -> None:
    model, plain = build(), build()
    kinds = [type(m) for m in model.modules()]
    convert(model)
    step(model)
    assert isinstance(model.model.layers[0].mlp, HaloGatedMLP)
    assert isinstance(model.model.layers[0].mlp, transformers.models.llama.modeling_llama.LlamaMLP)
    assert model.state_dict().keys() == plain.state_dict().keys()
    revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(plain), strict=True))
    assert len(convert(model)[1].fused) == 6


def test_copies_are_fused_on_their_own() -> None:
    model, _ = convert(build())
    expected = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norm, attention = twin.model.layers[0].input_layernorm, twin.model.layers[0].self_attn
        assert isinstance(norm, FusedModule)
        assert norm.fusion.readers[0].module is attention
        assert runs_fused(twin) == (4, 2)
        assert all(torch.equal(a, b) for a, b in zip(step(twin), expected, strict=True))


def test_factors_are_saved_restored_and_taken_anew() -> None:
    model, _ = convert(build())
    expected = step(model)
    state = equalizer_state_dict(model)
    fresh, _ = convert(build())
    load_equalizer_state_dict(fresh, state)
    assert all(torch.equal(a, b) for a, b in zip(step(fresh), expected, strict=True))
    model.model.layers[0].self_attn.k_proj.reset_equalizer()
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    state["model.layers.0.self_attn.k_proj"][0] += 1
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj.*has other factors for each"):
        load_equalizer_state_dict(fresh, state)
    assert runs_fused(fresh) == (3, 2)
    step(fresh)


@pytest.mark.slow
def test_training_goes_as_with_the_layers_one_by_one() -> None:
    losses = []
    for fuse in (True, False):
        model, _ = convert(build().bfloat16(), fuse=fuse)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(100):
            ids = torch.randint(1, 8, (4, 1), generator=generator) + torch.arange(16) % 7
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(sum(found[-10:]) / 10)
    assert losses[1] < 2
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(("recompute", "share"), [("nothing", 0.595), ("inputs", 0.5), ("mlp", 0.21)])
def test_bytes_that_a_block_keeps(recompute: str, share: float) -> None:
    """A Llama-3-8B block at a 16th of its width, bfloat16, eager, beside what the plain block keeps."""
    fields = {
        "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 1, "attn_implementation": "sdpa",
    }  # fmt: skip
    kept = []
    for fused in (True, False):
        model = build(**fields).bfloat16()
        if fused:
            convert(model, "fp8", recompute=recompute)
            step(model)
            model.zero_grad()  # else this is another micro-batch, which keeps rounded weights
        layer, x = model.model.layers[0], torch.randn(1, 512, 256, dtype=torch.bfloat16, requires_grad=True)
        rotary = model.model.rotary_emb(x, torch.arange(512)[None])
        parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        found: dict[int, int] = {}

        def pack(t: Tensor, found: dict[int, int] = found, parameters: set[int] = parameters) -> Tensor:
            if t.untyped_storage().data_ptr() not in parameters:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x, position_embeddings=rotary)
        assert y.requires_grad
        kept.append(sum(found.values()) / 512 / 256)
    assert kept[0] < share * kept[1]
