"""Loss, optimizer, activation checkpointing and checkpoints of the recipes under FSDP2: two gloo processes against one without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from fsdp_fixtures import run_on_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from halo_train import convert_to_halo_training
from halo_train.training import checkpoint
from halo_train.training.blocks import blocks, checkpoint_activations
from halo_train.training.checkpoint import CheckpointWriter, Progress, load_checkpoint
from halo_train.training.config import TrainSection
from halo_train.training.errors import RunFailed, UserError
from halo_train.training.loss import TokenLoss
from halo_train.training.optim import StochasticAdamW, build_optimizer

IDS = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def build(dtype: torch.dtype) -> TokenLoss:
    """96 words and a width of 48 do not come out even over the ranks' rows of 16; embedding and output layer are one."""
    transformers.set_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0,
    )  # fmt: skip
    loss = TokenLoss(transformers.AutoModelForCausalLM.from_config(config).to(dtype), max_logits=7 * 97)
    convert_to_halo_training(loss.model, recipe="bf16")  # 8 bits and their equaliser are tests/test_fsdp.py's
    checkpoint_activations(loss.model, "selective")
    return loss.train()


def train(loss: TokenLoss, ids: Tensor, ranks: int) -> dict[str, Tensor]:
    """Two steps with the mean over all ranks' tokens; losses, gradients of the first step and the weights."""
    section = TrainSection.model_validate({"steps": 2, "lr": 1e-3})
    optimizer = build_optimizer(loss.model, section)
    found: dict[str, Tensor] = {}
    for step in range(2):
        value = loss(ids, ids) / (IDS.shape[0] * (IDS.shape[1] - 1)) * ranks  # FSDP2 averages over the ranks
        value.backward()
        if step == 0:
            found |= {f"gradient of {name}": _full(p.grad) for name, p in loss.model.named_parameters()}
            found["loss"] = value.detach()
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, StochasticAdamW) and ranks > 1:
        assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
        assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    return found | {name: _full(p) for name, p in loss.model.named_parameters()}


def _full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train_sharded(rank: int, world: int, device: str, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loss = build(dtype)
        for block in blocks(loss.model, ""):
            fully_shard(block)
        fully_shard(loss)
        torch.save(train(loss, IDS[2 * rank : 2 * rank + 2], 2), folder / f"{dtype}-{rank}.pt")
    check_saving_in_the_background(loss, rank, folder / "checkpoints")


def check_saving_in_the_background(loss: TokenLoss, rank: int, folder: Path) -> None:
    """Collectives of the training go on meanwhile; what fails on one rank fails on all."""
    if rank == 0:
        folder.mkdir()
    optimizer = torch.optim.AdamW(loss.model.parameters(), 1e-2)
    loss(IDS, IDS).backward()
    optimizer.step()
    saved = {name: _full(p).clone() for name, p in loss.model.named_parameters()}
    with CheckpointWriter(folder, keep=1, background=True) as writer:
        path = writer.save(loss.model, optimizer, Progress(1, 1))
        for _ in range(3):
            loss(IDS, IDS).backward()
            optimizer.step()
        writer.wait()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:

                def refuse(*_: object) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr(checkpoint.os, "rename", refuse)
            writer.save(loss.model, optimizer, Progress(2, 2))
            with pytest.raises(RunFailed, match=r"step-2 could not be written: .*No space .*is .*step-1"):
                writer.wait()
    check_that_another_model_is_refused(path)
    assert load_checkpoint(path, loss.model, optimizer) == Progress(1, 1)
    for name, p in loss.model.named_parameters():
        assert torch.equal(_full(p), saved[name]), name


def check_that_another_model_is_refused(path: Path) -> None:
    """On each rank, and neither waits for the other."""
    for hidden, layers, message in ((96, 2, "Size mismatch"), (48, 3, "Missing key")):
        config = transformers.Gemma2Config(
            vocab_size=97, hidden_size=hidden, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=3,
            num_key_value_heads=1, head_dim=16,
        )  # fmt: skip
        model = fully_shard(transformers.AutoModelForCausalLM.from_config(config).bfloat16())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with pytest.raises(UserError, match=f"cannot be loaded: .*{message}.*run.overwrite=true"):
            load_checkpoint(path, model, optimizer)


def test_two_ranks_are_one(tmp_path: Path) -> None:
    run_on_ranks([train_sharded], 2, "cpu", tmp_path)
    for dtype, close in ((torch.float32, 0.015), (torch.bfloat16, 0.03)):
        alone = train(build(dtype), IDS, 1)
        ranks = [torch.load(tmp_path / f"{dtype}-{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(
            sum(rank.pop("loss") for rank in ranks) / 2, alone.pop("loss"), rtol=1e-3, atol=0
        )
        for name, expected in alone.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            # bfloat16 products of other shapes, at most 0.006 and 0.012; AdamW's first steps take the sign of a gradient, however small.
            error = (ranks[0][name] - expected).float().norm() / expected.float().norm()
            assert error < close, (dtype, name, error)
