"""Shared inputs in training: recomputed, resumed, distributed, and in models of transformers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shared_input_fixtures import batch, build, count_roundings, equal, plain_twin, relative, step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halo_train import (
    convert_to_halo_training,
    equalizer_state_dict,
    load_equalizer_state_dict,
)


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return count_roundings(monkeypatch)


def selective(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op.name() in ("halo_train::quantize_rows", "halo_train::matmul_weight_rows")
    of_weight = bool(args) and isinstance(args[0], nn.Parameter)
    return CheckpointPolicy.MUST_SAVE if keep and not of_weight else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "full": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, selective),
    ),
}


class Checkpointed(nn.Module):
    def __init__(self, blocks: nn.Module, mode: str) -> None:
        super().__init__()
        self.blocks, self.mode = blocks, mode

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = CHECKPOINTS[self.mode](block, x)
        return x


@pytest.mark.parametrize("mode", CHECKPOINTS)
@pytest.mark.parametrize("recipe", ["fp8", "int8", "halo2_int8"])
def test_recomputing_gives_the_same_bits_from_the_first_step_on(recipe: str, mode: str) -> None:
    plain, recomputed = build(recipe, blocks=2), Checkpointed(build(recipe, blocks=2), mode)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (plain, recomputed)]
    for seed in range(3):
        ours, theirs = (step(model, batch(seed)) for model in (recomputed, plain))
        assert equal(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert recomputed.blocks[0].q.input_group.settled


class Cross(nn.Module):
    """Layers inside two checkpointed regions and outside of them, all reading one tensor, as cross-attention does."""

    def __init__(self, region: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1
        y = self.layers[0](h)
        for a, b in ((1, 2), (3, 4)):
            y = y + self.region(lambda h, y, a=a, b=b: self.layers[a](h) * self.layers[b](h).tanh(), h, y)
        return y + self.layers[5](h)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("recipe", ["fp8", "halo1_int8"])
def test_a_group_across_checkpointed_regions(mode: str, recipe: str) -> None:
    torch.manual_seed(0)
    model = Cross(lambda function, *args: function(*args))
    convert_to_halo_training(model, recipe=recipe, share_inputs=True)
    recomputed = copy.deepcopy(model)
    recomputed.region = CHECKPOINTS[mode]
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (model, recomputed)]
    for seed in range(3):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        if mode == "full":
            assert equal(step(model, x), step(recomputed, x))
        else:  # each region is a group of its own
            if seed:
                equalizer_state_dict(recomputed)
            plain = plain_twin(recomputed)
            plain.region = model.region
            for ours, other in zip(step(recomputed, x), step(plain, x), strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("mode", CHECKPOINTS)
def test_two_forwards_before_the_first_backward(mode: str) -> None:
    """As in preference training: the second must not settle the groups, for the first is yet to be recomputed."""
    models = build(), Checkpointed(build(), mode)
    for seed in range(2):
        for model in models:
            model.zero_grad()
            (model(batch(seed)).square().mean() + model(batch(9 - seed)).square().mean()).backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
        assert equal(*([p.grad for p in model.parameters()] for model in models))


def test_optimizer_steps_inside_backward() -> None:
    """Groups must not settle between a forward and its recomputation."""
    models = build(blocks=2), Checkpointed(build(blocks=2), "selective")
    for model in models:
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], 0.1)
            parameter.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    for seed in range(2):
        assert equal(*(step(model, batch(seed)) for model in models))


def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer) -> Iterator[list[Tensor]]:
    for seed in steps:
        results = step(model, batch(seed))
        optimizer.step()
        yield results


@pytest.mark.parametrize("recipe", ["fp8", "halo1_int8"])
@pytest.mark.parametrize("saved_after", [1, 3])
def test_a_resumed_run_is_the_same_run(recipe: str, saved_after: int) -> None:
    whole = build(recipe)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    expected = list(train(whole, range(5), optimizer))

    first = build(recipe)
    list(train(first, range(saved_after), torch.optim.SGD(first.parameters(), 0.1)))
    equalizer, weights = equalizer_state_dict(first), first.state_dict()
    resumed = build(recipe)
    resumed.load_state_dict(weights)
    load_equalizer_state_dict(resumed, equalizer)
    rest = list(train(resumed, range(saved_after, 5), torch.optim.SGD(resumed.parameters(), 0.1)))
    assert all(equal(a, b) for a, b in zip(rest, expected[saved_after:], strict=True))


def sharded(rank: int, share: bool) -> list[Tensor]:
    """Under FSDP2 every layer rounds for itself, also if a forward before has found groups."""
    model = build(share=share)
    model(batch(0))
    fully_shard(model[0], reshard_after_forward=False)
    fully_shard(model)
    results = [*step(model, batch(rank))[:2], *step(model, batch(2 + rank))[:2]]
    equalizer_state_dict(model)  # weights are still gathered, rounded with the factors they have
    return [*results, *step(model, batch(4 + rank))[:2]]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(
        3
    ):  # the groups settle in the second; DDP broadcasts the factors of rank 0 before the third
        step(model, batch(10 * seed + rank))
        if seed < 2:
            optimizer.step()
    result = {
        "grads": [p.grad for p in model.parameters()],
        "equalizer": equalizer_state_dict(model.module),
        "weights": model.module.state_dict(),
        "sharded": [sharded(rank, share) for share in (True, False)],
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert all(torch.equal(e, ranks[1]["equalizer"][name]) for name, e in ranks[0]["equalizer"].items())
    assert equal(ranks[0]["grads"], ranks[1]["grads"])
    assert all(equal(*rank["sharded"]) for rank in ranks)
    alone = build()
    alone.load_state_dict(ranks[0]["weights"])
    load_equalizer_state_dict(alone, ranks[0]["equalizer"])
    grads = [step(alone, batch(20 + rank))[2:] for rank in range(2)]
    for ours, *both in zip(ranks[0]["grads"], *grads, strict=True):
        torch.testing.assert_close(ours, sum(both) / 2)


FIELDS = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "shared"), [("Llama", 4), ("Qwen2", 4), ("Phi3", 0)])
def test_models_of_transformers(kind: str, shared: int, roundings: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**FIELDS))
    convert_to_halo_training(model, recipe="int8", share_inputs=True, fuse=False)
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))

    def loss_and_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss_and_gradient(model)
    equalizer_state_dict(model)
    roundings.clear()
    loss, grad = loss_and_gradient(model)
    assert len(roundings) == shared  # q, k, v and gate, up of two layers; Phi3 has them fused
    twin = plain_twin(model)
    plain_loss, plain_grad = loss_and_gradient(twin)
    assert torch.equal(loss, plain_loss)
    assert relative(grad, plain_grad) < 0.02
    model.eval()
    prompt = ids[:, :4]
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, twin.eval().generate(prompt, max_new_tokens=4, do_sample=False))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same = loss_and_gradient(model)
    assert torch.equal(again, loss)
    assert torch.equal(same, grad)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["fp8", "halo1_int8"])
def test_checkpointing_of_a_run(recipe: str, mode: Any) -> None:
    """With the policy of halo-train run, in the step that takes factors and in the one that shares."""
    transformers = pytest.importorskip("transformers")
    results = []
    for checkpointing in (False, True):
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**FIELDS)).train()
        convert_to_halo_training(model, recipe=recipe, share_inputs=True, fuse=False)
        if checkpointing:
            importlib.import_module("halo_train.training.blocks").checkpoint_activations(model, mode)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
            losses[-1].backward()
            optimizer.step()
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert equal(*results)
