"""LoRA of the peft library around and inside converted models, in both orders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from fsdp_fixtures import run_on_ranks, weights_seen
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from halo_train import HaloLinear, convert_to_halo_training, revert
from halo_train.linear import halo_linears
from halo_train.training.loss import TokenLoss

peft = pytest.importorskip("peft")

LLAMA = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
IDS = torch.randint(1, 128, (2, 32), generator=torch.Generator().manual_seed(0))


def build(order: str) -> torch.nn.Module:
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(LLAMA)
    # B is random, not zero: a change of the output that the merge has to keep, and a gradient for A.
    lora = peft.LoraConfig(r=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    if order == "convert first":
        convert_to_halo_training(model)
    model = peft.get_peft_model(model, lora)
    if order == "peft first":
        report = convert_to_halo_training(model)
        reasons = {skip.reason for skip in report.skipped if "lora_" in skip.name}
        assert len(reasons) == 1
        assert "low-rank adapter" in reasons.pop()
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["peft first", "convert first"])
def test_adapters_train_on_8_bit_layers_and_merge(order: str) -> None:
    exact, model = gradients(build("no conversion")), build(order)
    assert sum(isinstance(m, HaloLinear) for m in model.modules()) == 14
    found = gradients(model)
    assert found.keys() == exact.keys()
    assert all("lora_" in name for name in found)  # frozen weights have no gradient, and no wgrad is computed
    flat, expected = (torch.cat([g.flatten() for g in grads.values()]) for grads in (found, exact))
    assert 0.99 < torch.nn.functional.cosine_similarity(flat, expected, dim=0) < 1

    merged = revert(model).merge_and_unload()
    assert not any(isinstance(m, HaloLinear) for m in merged.modules())
    with torch.no_grad():
        plain = build("no conversion").merge_and_unload()(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, plain)


def test_the_loss_leaves_the_logits_to_a_wrapped_model() -> None:
    model = build("no conversion").double().eval()
    loss = TokenLoss(model)
    assert loss.whole_logits == "its output layer does not get the last hidden states as they are"
    with torch.no_grad():
        assert loss(IDS, IDS) / 62 == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), rel=1e-6)


def check_adapters_train_around_weights_gathered_in_8_bits(
    rank: int, world: int, device: str, folder: Path
) -> None:
    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    for order in ("peft first", "convert first"):
        model, reference = build(order), build(order)
        for _, layer in halo_linears(reference):
            layer.config = layer.config.with_folded_dgrad
        with torch.no_grad():
            reference(IDS)  # the factors of both ranks' tokens
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
        with weights_seen(model) as seen:
            found = loss(model, IDS[rank : rank + 1])
        assert len(seen) == 14
        assert all(isinstance(weight, tuple) for weight in seen.values())
        torch.testing.assert_close(found, loss(reference, IDS[rank : rank + 1]), rtol=1e-5, atol=0)
        found.backward()
        for row in IDS:
            (loss(reference, row[None]) / world).backward()
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert ours.requires_grad == ("lora_" in name)
            if ours.requires_grad:
                difference = ours.grad.full_tensor() - theirs.grad
                assert difference.norm() < 2e-3 * theirs.grad.norm(), name
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2).step()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        saved = get_model_state_dict(model, options=options)
        assert all("lora_" in name for name in saved)
        assert bool(saved) == (rank == 0)


def test_adapters_train_around_weights_gathered_in_8_bits(tmp_path: Path) -> None:
    run_on_ranks([check_adapters_train_around_weights_gathered_in_8_bits], 2, "cpu", tmp_path)
