"""An 8-bit output layer of several processes, tied to the embedding and not: FSDP2 and DDP, two gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from fsdp_fixtures import run_on_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from halo_train import HaloLinear, convert_to_halo_training
from halo_train.fsdp import GatheredWeight
from halo_train.training.blocks import blocks
from halo_train.training.data import IGNORE
from halo_train.training.loss import TokenLoss

IDS = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(0))
KINDS = {"untied": "LlamaConfig", "tied": "Gemma2Config"}


def build(kind: str) -> TokenLoss:
    transformers.set_seed(0)
    config = getattr(transformers, KINDS[kind])(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    loss = TokenLoss(transformers.AutoModelForCausalLM.from_config(config), max_logits=7 * 97)
    convert_to_halo_training(loss.model, recipe={"lm_head": "fp8"}, output_layer=True, fuse=False)
    return loss.train()


def head_of(loss: TokenLoss) -> HaloLinear:
    return loss.model.get_output_embeddings()


def step(loss: torch.nn.Module, ids: Tensor, ranks: int) -> dict[str, Tensor]:
    """Takes the equaliser; then loss, gradients of the mean over all ranks' tokens."""
    with torch.no_grad():
        loss(ids, ids)
    value = loss(ids, ids) / (IDS.shape[0] * (IDS.shape[1] - 1)) * ranks
    value.backward()
    found = {name.removeprefix("module."): whole(p.grad) for name, p in loss.named_parameters()}
    return found | {"loss": value.detach()}


def whole(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


def run_sharded(rank: int, world: int, device: str, folder: Path) -> None:
    for kind in KINDS:
        loss = build(kind)
        for block in blocks(loss.model, ""):
            fully_shard(block)
        fully_shard(loss)
        found = step(loss, IDS[2 * rank : 2 * rank + 2], world)
        # Tied, it is gathered as it is, which an embedding can read.
        loss.unshard()
        assert isinstance(head_of(loss).weight, GatheredWeight) == (kind == "untied")
        loss.reshard()
        torch.save({**found, "exponent": head_of(loss).equalizer_exponent}, folder / f"fsdp-{kind}-{rank}.pt")
        # A rank without a trained token takes part in the collectives.
        labels = IDS[2 * rank : 2 * rank + 2] if rank else torch.full_like(IDS[:2], IGNORE)
        loss(IDS[:2], labels).backward()


def run_replicated(rank: int, world: int, device: str, folder: Path) -> None:
    for kind in KINDS:
        loss = DistributedDataParallel(build(kind))
        found = step(loss, IDS[2 * rank : 2 * rank + 2], world)
        torch.save(
            {**found, "exponent": head_of(loss.module).equalizer_exponent}, folder / f"ddp-{kind}-{rank}.pt"
        )


def check_a_layer_that_is_not_whole(rank: int, world: int, device: str, folder: Path) -> None:
    loss = build("untied")
    fully_shard(loss.model.base_model)
    fully_shard(loss.model.lm_head)  # and not the loss, which reads it
    with pytest.raises(ValueError, match="call the module that fully_shard was called on"):
        loss(IDS, IDS)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    run_on_ranks([run_sharded, run_replicated, check_a_layer_that_is_not_whole], 2, "cpu", tmp_path)
    for kind in KINDS:
        alone = build(kind)
        expected = step(alone, IDS, 1)
        for how in ("fsdp", "ddp"):
            ranks = [torch.load(tmp_path / f"{how}-{kind}-{rank}.pt") for rank in range(2)]
            same = [torch.equal(rank.pop("exponent"), head_of(alone).equalizer_exponent) for rank in ranks]
            assert all(same) or how == "ddp"  # DDP has those of the first rank's batch
            for name, value in expected.items():
                parts = [rank[name] for rank in ranks]
                found = (parts[0] + parts[1]) / 2
                if name != "loss":
                    assert torch.equal(*parts)
                assert (found - value).norm() < 0.05 * value.norm(), (how, kind, name)
