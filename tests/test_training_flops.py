"""Counted operations against torch's own counter, which watches what runs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from halo_train import convert_to_halo_training
from halo_train.training.data import IGNORE, Batch
from halo_train.training.flops import BF16_PEAKS, FlopCounter, bf16_peak
from halo_train.training.loss import TokenLoss

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gpt2, Conv1D": ("GPT2Config", {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
IDS = torch.randint(1, 128, (2, 32), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(32) % 4 == 3, IDS, IGNORE)
BATCH = Batch(IDS, LABELS, None, tokens=64, trained=int((LABELS[:, 1:] != IGNORE).sum()))


def build(name: str) -> TokenLoss:
    kind, fields = MODELS[name]
    config = getattr(transformers, kind)(**{**SMALL, **fields})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return TokenLoss(model).train()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_total_is_what_runs(name: str, frozen: bool) -> None:
    loss = build(name)
    if frozen:
        for parameter in loss.model.base_model.parameters():
            parameter.requires_grad_(parameter.dim() != 2)
        loss.model.get_input_embeddings().weight.requires_grad_(True)  # dgrad goes all the way back
    with FlopCounterMode(display=False) as counter:
        loss(IDS, LABELS).backward()
    # Torch computes the scores and values that the causal mask drops: 32 keys a query in place of 16.5 on average.
    config = loss.model.config
    masked = 12.0 * config.num_hidden_layers * config.hidden_size * 2 * 32 * (32 - 16.5)
    # Rotary angles are a product, too.
    assert FlopCounter(loss.model).step([BATCH]).total + masked == pytest.approx(
        counter.get_total_flops(), rel=0.005
    )


def test_share_in_8_bits() -> None:
    loss = build("llama")
    counter = FlopCounter(loss.model)
    assert counter.step([BATCH]).eight_bit == 0
    recipes = {"*mlp*": "fp8", "*q_proj": "int8", "*": "bf16"}
    convert_to_halo_training(loss.model, recipe=recipes)
    flops = FlopCounter(loss.model).step([BATCH, BATCH])
    assert flops.total == 2 * counter.step([BATCH]).total
    assert flops.eight_bit == 2 * 64 * 6 * 2 * (3 * 64 * 96 + 64 * 64)


def test_share_of_the_output_layer() -> None:
    loss = build("llama")
    convert_to_halo_training(loss.model, recipe={"lm_head": "fp8"}, output_layer=True)
    assert FlopCounter(loss.model).step([BATCH]).eight_bit == BATCH.trained * 6 * 128 * 64


def test_packed_documents_attend_to_themselves() -> None:
    counter = FlopCounter(build("llama").model)
    halves = torch.arange(32).remainder(16).expand(2, -1)
    whole, packed = (counter.step([Batch(IDS, LABELS, p, 64, 16)]).total for p in (None, halves))
    pairs = 2 * (32 * 33 / 2 - 2 * 16 * 17 / 2)
    assert whole - packed == pytest.approx(12 * 2 * 64 * pairs)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bf16_peak(torch.device("cuda")) == peak
    assert bf16_peak(torch.device("cpu")) is None
    assert all(value > 1e14 for value in BF16_PEAKS.values())
