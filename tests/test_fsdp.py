"""FSDP2 around converted models: gloo on the CPU with 2 and 3 ranks, NCCL on 2 and 4 GPUs.

One process group a world size runs every check below, because starting one takes longer than all of them.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halo_train import (
    HaloLinear,
    convert_to_halo_training,
    equalizer_state_dict,
    fsdp,
    load_equalizer_state_dict,
)
from halo_train.linear import halo_linears
from halo_train.operands import quantize_weight

WIDTH = 48


class Block(nn.Module):
    """Rows that 2, 3 and 4 ranks share evenly, unevenly, and too few for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 96, bias=False)
        self.odd = nn.Linear(96, 33)
        self.few = nn.Linear(33, 4)
        self.down = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.few(torch.relu(self.odd(self.up(self.norm(x))))))


def build(
    recipe: str = "fp8", dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block()).to(dtype)
    convert_to_halo_training(model, recipe=recipe, module_filter_fn=lambda *_: True)
    return model.to(device)


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    for block in model:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def batch(step: int, rank: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    x[:, rank] *= 50
    return x.to(device, dtype)


def whole_batch(step: int, world: int, device: str) -> Tensor:
    return torch.cat([batch(step, rank, device) for rank in range(world)])


def folding_dgrad(model: nn.Sequential) -> nn.Sequential:
    """As its layers run with weights that are gathered in 8 bits."""
    for _, layer in halo_linears(model):
        layer.config = layer.config.with_folded_dgrad
    return model


def alone(recipe: str, device: str, world: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The model on one rank, with the equalizers of everybody's first batch."""
    model = folding_dgrad(build(recipe, dtype, device))
    with torch.no_grad():
        model(whole_batch(0, world, device).to(dtype))
    return model


@contextlib.contextmanager
def weights_seen(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Copies of what the layers had for a weight in their forward."""
    seen: dict[str, Any] = {}

    def look(layer: HaloLinear, args: Any, output: Any) -> None:
        weight = layer.weight
        rounded = isinstance(weight, fsdp.GatheredWeight)
        seen[layer.fqn] = tuple(t.clone() for t in weight.quantized()) if rounded else weight.detach().clone()

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, HaloLinear)]
    yield seen
    for handle in handles:
        handle.remove()


def full(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def assert_gathered_bits(model: nn.Module, seen: dict[str, Any]) -> None:
    weights = full(model)
    for name, (data, scale) in seen.items():
        layer = model.get_submodule(name)
        expected = quantize_weight(weights[f"{name}.weight"], layer.equalizer(), layer.config)
        assert torch.equal(data.view(torch.uint8), expected.data.view(torch.uint8)), name
        assert torch.equal(scale, expected.scale), name


@contextlib.contextmanager
def raises(message: str) -> Iterator[None]:
    """The error on every rank."""
    text = ""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError) as error:
        text = str(error)
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert all(message in t for t in texts), texts


@contextlib.contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """Bytes of the inputs of FSDP2's collectives."""
    counts = {"all_gather": 0, "reduce_scatter": 0}
    # The first is what FSDP2 calls since torch 2.13.
    names = {
        "all_gather": ["all_gather_single", "all_gather_into_tensor"],
        "reduce_scatter": ["reduce_scatter_single", "reduce_scatter_tensor"],
    }
    patch = pytest.MonkeyPatch()

    def counting(function: Any, kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[1] if len(args) > 1 else kwargs.get("input_tensor", kwargs.get("input"))
            counts[kind] += sent.numel() * sent.element_size()
            return function(*args, **kwargs)

        return call

    for kind, choices in names.items():
        name = next(name for name in choices if hasattr(dist, name))
        patch.setattr(dist, name, counting(getattr(dist, name), kind))
    try:
        yield counts
    finally:
        patch.undo()


def check_one_step_has_the_bits_of_one_rank(rank: int, world: int, device: str, folder: Path) -> None:
    for recipe in ("fp8", "int8", "fp8_plain", "halo1_fp8", "bf16"):
        reference, model = alone(recipe, device, world), shard(build(recipe, device=device))
        x = batch(0, rank, device).requires_grad_()
        with weights_seen(model) as seen:
            y = model(x)
        y.square().mean().backward()
        x_alone = x.detach().clone().requires_grad_()
        y_alone = reference(x_alone)
        y_alone.square().mean().backward()
        assert torch.equal(y, y_alone), recipe
        assert torch.equal(x.grad, x_alone.grad), recipe
        if recipe in ("fp8", "int8", "fp8_plain"):
            assert_gathered_bits(model, seen)
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            dist.all_reduce(theirs.grad)
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / world, msg=f"{recipe} {name}")
        for name, exponent in equalizer_state_dict(reference).items():
            assert torch.equal(exponent, equalizer_state_dict(model)[name]), name


def check_the_wire_carries_one_byte_a_weight(rank: int, world: int, device: str, folder: Path) -> None:
    if world == 1:
        return  # nothing is sent
    sent = {}
    for recipe in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Sequential(nn.Linear(768, 96 * world, bias=False)) for _ in range(2)]
        ).bfloat16()
        convert_to_halo_training(model, recipe=recipe)
        model = shard(model.to(device))
        x = torch.randn(16, 768, device=device, dtype=torch.bfloat16)
        for _ in range(2):
            with bytes_sent() as counts:
                model[0](x).sum().backward()
        sent[recipe] = counts
    assert 0.5 < sent["fp8"]["all_gather"] / sent["bf16"]["all_gather"] < 0.51, sent
    assert sent["fp8"]["reduce_scatter"] == sent["bf16"]["reduce_scatter"] > 0


def check_training_follows_one_rank(rank: int, world: int, device: str, folder: Path) -> None:
    reference, model = alone("fp8", device, world), shard(build(device=device))
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (reference, model)]
    target = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    first = 0.0
    for step in range(100 if device == "cuda" else 40):
        x, whole = batch(step, rank, device), whole_batch(step, world, device)
        ours = (model(x) - x - target).square().mean()
        theirs = (reference(whole) - whole - target).square().mean()
        for loss, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        first = first or theirs.item()
        ours = ours.detach() / world
        dist.all_reduce(ours)
        # Reductions in another order, and columns of E whose scale is that of this rank's tokens.
        assert abs(ours - theirs) < 0.01 * first, (step, ours, theirs)
    assert theirs < 0.2 * first
    norm = model[0].norm.weight.full_tensor().detach()
    norms = [torch.empty_like(norm) for _ in range(world)]
    dist.all_gather(norms, norm)
    assert all(torch.equal(norm, other) for other in norms)


def check_optimizers_and_clipping_work_on_shards(rank: int, world: int, device: str, folder: Path) -> None:
    for kwargs in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        model = shard(build(device=device))
        model(batch(0, rank, device)).square().mean().backward()
        reference = build("bf16", device=device)
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            theirs.grad = ours.grad.full_tensor().clone()  # at one rank it is the shard itself
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, reference)]
        torch.testing.assert_close(norms[0].full_tensor(), norms[1])
        for m in (model, reference):
            torch.optim.AdamW(m.parameters(), 0.1, **kwargs).step()
        for ours, theirs in zip(full(model).values(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach())
        with weights_seen(model) as seen:
            model(batch(1, rank, device))
        assert_gathered_bits(model, seen)


def check_gradient_accumulation(rank: int, world: int, device: str, folder: Path) -> None:
    grads = []
    for sync_every in (True, False):
        model = shard(build(device=device))
        for step in range(3):
            model.set_requires_gradient_sync(sync_every or step == 2)
            model(batch(step, rank, device)).square().mean().backward()
        grads.append([p.grad.full_tensor() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def check_a_rank_without_tokens(rank: int, world: int, device: str, folder: Path) -> None:
    model = shard(build(device=device))
    x = batch(0, rank, device)[: 0 if rank == 1 else 16].requires_grad_()
    y = model(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    reference = folding_dgrad(build(device=device))
    everything = torch.cat([batch(0, r, device) for r in range(world) if r != 1])
    reference(everything).square().sum().backward()
    assert all(
        torch.equal(v, equalizer_state_dict(reference)[n]) for n, v in equalizer_state_dict(model).items()
    )
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        noise = (world * ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
        assert noise < 0.1


def check_sharding_variants(rank: int, world: int, device: str, folder: Path) -> None:
    expected = alone("fp8", device, world)(batch(0, rank, device))
    meshes = {"replicated": init_device_mesh(device, (world, 1), mesh_dim_names=("replicate", "shard"))}
    if world == 4:
        meshes["HSDP"] = init_device_mesh(device, (2, 2), mesh_dim_names=("replicate", "shard"))
    variants: list[dict[str, Any]] = [
        {"reshard_after_forward": False},
        *({"mesh": mesh} for mesh in meshes.values()),
    ]
    if device == "cuda":
        variants.append({"offload_policy": CPUOffloadPolicy()})
    for kwargs in variants:
        model = shard(build(device=device), **kwargs)
        y = model(batch(0, rank, device))
        assert torch.equal(y, expected), kwargs
        y.square().mean().backward()
        torch.optim.AdamW(model.parameters(), 0.1).step()
        with weights_seen(model) as seen:
            model(batch(1, rank, device))
        if "offload_policy" not in kwargs:
            assert_gathered_bits(model, seen)


def check_mixed_precision_rounds_the_master_weights(rank: int, world: int, device: str, folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(build(device=device), mp_policy=policy)
    with weights_seen(model) as seen:
        y = model(batch(0, rank, device))
    assert y.dtype is torch.bfloat16
    y.square().mean().backward()
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())
    assert_gathered_bits(model, seen)


def check_meta_initialisation(rank: int, world: int, device: str, folder: Path) -> None:
    with torch.device("meta"):
        model = build(device="meta")
    shard(model, mesh=init_device_mesh(device, (world,)))
    model.to_empty(device=device)
    set_model_state_dict(
        model,
        build(device=device).state_dict() if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    assert all(isinstance(b.up.weight._local_tensor, fsdp.ShardedWeight) for b in model)
    assert torch.equal(model(batch(0, rank, device)), alone("fp8", device, world)(batch(0, rank, device)))


def check_frozen_and_shared_weights(rank: int, world: int, device: str, folder: Path) -> None:
    def make() -> nn.Sequential:
        model = build(device=device)
        model[1].up.weight = model[0].up.weight
        model[0].odd.weight.requires_grad_(False)
        return model

    reference = make()
    with torch.no_grad():
        reference(whole_batch(0, world, device))
    model = fully_shard(make())
    with weights_seen(model) as seen:
        y = model(batch(0, rank, device))
    assert torch.equal(y, reference(batch(0, rank, device)))
    # Two layers, two equalizers: a shared weight travels as it is.
    assert isinstance(seen["0.up"], Tensor)
    assert isinstance(seen["0.odd"], tuple)
    y.square().mean().backward()
    assert model[0].odd.weight.grad is None
    assert model[0].up.weight.grad is not None


@contextlib.contextmanager
def tensors_saved() -> Iterator[list[Tensor]]:
    """What is kept for backward."""
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield saved


def keeping_rounded_inputs() -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op == torch.ops.halo_train.quantize_rows.default and not isinstance(args[0], nn.Parameter)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def check_activation_checkpointing_and_compile(rank: int, world: int, device: str, folder: Path) -> None:
    x = batch(0, rank, device)
    results = []
    # Importing the compiler takes longer than all other checks.
    for variant in ("plain", "checkpointed", "selectively", "compiled")[: 3 if world == 3 else 4]:
        model = build(device=device)
        context = {"context_fn": keeping_rounded_inputs} if variant == "selectively" else {}
        if variant in ("checkpointed", "selectively"):
            for block in model:
                block.forward = lambda x, f=block.forward, c=context: checkpoint(
                    f, x, use_reentrant=False, **c
                )
        shard(model)
        if variant == "compiled":
            with torch.no_grad():
                model(x)
        if variant == "compiled":
            torch.compiler.reset()
            model[0].compile(backend="aot_eager", fullgraph=True)
        with tensors_saved() as saved:
            y = model(x)
        if variant == "compiled":
            # Not a transposed copy: the gathered weight, which FSDP2 has freed by now.
            kept = [t for t in saved if t.shape == (96, WIDTH) and t.element_size() == 1]
            assert [t.untyped_storage().size() for t in kept] == [0] * len(model)
        y.square().mean().backward()
        results.append([y, *(p.grad.full_tensor() for p in model.parameters())])
    for name, variant in zip(("checkpointed", "selectively", "compiled"), results[1:], strict=False):
        for ours, plain in zip(variant, results[0], strict=True):
            torch.testing.assert_close(ours, plain, msg=name)


def check_checkpoints_hold_plain_weights(rank: int, world: int, device: str, folder: Path) -> None:
    model = shard(build(device=device))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(batch(0, rank, device)).square().mean().backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    assert {type(w._local_tensor) for w in weights.values()} == {Tensor}
    assert list(weights) == list(build("bf16").state_dict())
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "dcp")
    twin = shard(build(device=device, seed=1))
    loaded = twin.state_dict()
    dcp.load({"model": loaded}, checkpoint_id=folder / "dcp")
    twin.load_state_dict(loaded)
    load_equalizer_state_dict(twin, equalizer_state_dict(model))
    assert torch.equal(twin(batch(1, rank, device)), model(batch(1, rank, device)))
    # and after assigning other tensors
    twin.load_state_dict({name: torch.zeros_like(w) for name, w in loaded.items()}, assign=True)
    with weights_seen(twin) as seen:
        twin(batch(1, rank, device))
    assert all(not data.view(torch.uint8).any() for data, _ in seen.values())


def check_errors_on_every_rank(rank: int, world: int, device: str, folder: Path) -> None:
    model = shard(nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 64))).to(device))
    with raises("convert the model first, then call fully_shard"):
        convert_to_halo_training(model)
    if world > 1:
        with raises("must have converted the same layers"):
            shard(build("int8" if rank == 0 else "fp8", device=device))
    with raises("must be sharded along its rows"):
        fully_shard(
            build(device=device)[0].up, shard_placement_fn=lambda p: Shard(1) if 96 % world == 0 else Shard(0)
        )
        if 96 % world:
            raise ValueError("must be sharded along its rows")
    model = shard(build(device=device))
    with raises("call the module that fully_shard was called on"):
        model[0].up(batch(0, rank, device))
    with raises("call reshard() on"):
        model[0].unshard()
        load_equalizer_state_dict(model, equalizer_state_dict(alone("fp8", device, world)))
    model[0].register_forward_pre_hook(lambda m, a: m.up.weight.abs())
    with raises("only the layer itself can use it"):
        model(batch(0, rank, device))
    if world == 4:
        model = shard(build(device=device), reshard_after_forward=2)
        with raises("Expected 1 all_gather_output, got 2"):
            model(batch(0, rank, device))
    mesh = init_device_mesh(device, (world,))
    if rank == 0 and world > 1:  # the others have not converted their models
        patch = pytest.MonkeyPatch()
        patch.setattr(fsdp, "AGREEMENT_TIMEOUT", timedelta(seconds=1))
        patch.setattr(fsdp, "_sharded_so_far", fsdp._sharded_so_far.copy())
        with pytest.raises(ValueError, match="a rank that is not named did not come"):
            shard(build(device=device), mesh=mesh)
        patch.undo()
    dist.barrier()
    if device == "cuda":  # FSDP1 refuses CPUs itself
        model = FullyShardedDataParallel(build(device=device), device_id=rank)
        with raises("FSDP1"):
            model(batch(0, rank, device))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def worker(rank: int, world: int, device: str, folder: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for check in CHECKS:
        try:
            check(rank, world, device, Path(folder))
        except BaseException as error:
            raise AssertionError(
                f"{check.__name__} on rank {rank} of {world}:\n{traceback.format_exc()}"
            ) from error
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_gloo(world: int, tmp_path: Path):
    mp.spawn(worker, args=(world, "cpu", str(tmp_path)), nprocs=world)


@pytest.mark.gpu
def test_one_gpu(tmp_path: Path):
    mp.spawn(worker, args=(1, "cuda", str(tmp_path)), nprocs=1)


@pytest.mark.parametrize("world", [pytest.param(n, marks=pytest.mark.multi_gpu(n)) for n in (2, 4)])
def test_nccl(world: int, tmp_path: Path):
    mp.spawn(worker, args=(world, "cuda", str(tmp_path)), nprocs=world)
