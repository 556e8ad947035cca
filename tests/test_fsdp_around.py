"""What goes around converted models under FSDP2: initialisation, shared weights, recomputing and compiling, checkpoints, errors.

gloo on the CPU; on GPUs tests/test_fsdp_nccl.py runs the same checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_fixtures import (
    WIDTH,
    Block,
    alone,
    batch,
    build,
    checks_of,
    raises,
    run_on_ranks,
    shard,
    weights_seen,
    whole_batch,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halo_train import (
    agreement,
    convert_to_halo_training,
    equalizer_state_dict,
    fsdp,
    load_equalizer_state_dict,
    revert,
)
from halo_train.linear import halo_linears


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
    # The compiler takes longer than all other checks.
    compiled = device == "cuda" or world <= 2
    for variant in ("plain", "checkpointed", "selectively", "compiled")[: 4 if compiled else 3]:
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
    writer = dcp.HuggingFaceStorageWriter(
        str(folder / "hf"), save_distributed=True, enable_consolidation=True
    )
    dcp.save(weights, storage_writer=writer)
    whole = {name: weight.full_tensor() for name, weight in weights.items()}
    files = [safetensors.torch.load_file(file) for file in (folder / "hf").glob("*.safetensors")]
    assert {name: weight for file in files for name, weight in file.items()}.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name].cpu()) for file in files for name, weight in file.items())
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


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[Tensor]:
    """Losses of the whole batch, the same whatever the number of ranks."""
    rank, world, losses = dist.get_rank(), dist.get_world_size(), []
    for step in numbers:
        x = whole_batch(step, 12, "cpu").tensor_split(world)[rank]
        loss = (model(x) - x - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        dist.all_reduce(total)
        losses.append(total)
    return losses


def train_and_save(rank: int, world: int, device: str, folder: Path) -> None:
    """Ten steps; what there was after five, written meanwhile."""
    model = shard(build())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = steps(model, optimizer, range(5))
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "equalizer": equalizer_state_dict(model)}
    writing = dcp.async_save(state, checkpoint_id=folder / "dcp", process_group=dist.new_group())
    losses += steps(model, optimizer, range(5, 10))
    writing.result()
    torch.save(losses, folder / "losses.pt")


def resume(rank: int, world: int, device: str, folder: Path) -> None:
    model = shard(build(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    weights, states = get_state_dict(model, optimizer)
    equalizer = {name: torch.empty_like(layer.equalizer_exponent) for name, layer in halo_linears(model)}
    state = {"model": weights, "optimizer": states, "equalizer": equalizer}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    load_equalizer_state_dict(model, equalizer)
    before = torch.load(folder / "losses.pt")
    assert before[-1] < 0.8 * before[4] < before[0]
    # Columns of E are rounded with the scale of one rank's tokens.
    torch.testing.assert_close(steps(model, optimizer, range(5, 10)), before[5:], rtol=5e-3, atol=0)


def check_errors_on_every_rank(rank: int, world: int, device: str, folder: Path) -> None:
    model = shard(nn.Sequential(nn.Sequential(nn.Linear(WIDTH, 64))).to(device))
    with raises("convert the model first, then call fully_shard"):
        convert_to_halo_training(model)
    if world > 1:
        with raises("must have converted the same layers"):
            shard(build("int8" if rank == 0 else "fp8", device=device))
        # A rank that has fewer layers would not come to the last one.
        with raises("rank 0: 1.down 48x4 fp8; rank 1: nothing else"):
            model = nn.Sequential(Block(), Block())
            convert_to_halo_training(model, module_filter_fn=lambda _, name: rank == 0 or name != "1.down")
            shard(model.to(device))
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
        with raises("reshard_after_forward must be True or False"):
            shard(build(device=device), reshard_after_forward=2)
        model = shard(build("halo1_fp8", device=device), reshard_after_forward=2)  # gathered as it is
        model(batch(0, rank, device)).sum().backward()
    model = shard(build(device=device), reshard_after_forward=world)  # the same as True
    for block in model:
        block.set_unshard_in_backward(False)
    with raises("FSDP2 has freed the gathered weight"):
        model(batch(0, rank, device)).sum().backward()
    with raises("or revert() before fully_shard"):
        revert(model)


def check_tensor_parallelism_is_refused(rank: int, world: int, device: str, folder: Path) -> None:
    for plan in (ColwiseParallel(), RowwiseParallel()):
        model = build(device=device)
        parallelize_module(model[0], init_device_mesh(device, (world,)), {"up": plan})
        with raises("tensor parallelism is not supported"):
            model(batch(0, rank, device))
    mesh = init_device_mesh(device, (1, world), mesh_dim_names=("data", "tensor"))
    model = build(device=device)
    parallelize_module(model[0], mesh["tensor"], {"up": ColwiseParallel()})
    with raises("drop shard_placement_fn and tensor parallelism for this layer"):
        shard(model, mesh=mesh["data"])


def check_a_rank_that_does_not_come(rank: int, world: int, device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world,))
    if rank == 0 and world > 1:  # the others have not converted their models
        patch = pytest.MonkeyPatch()
        patch.setattr(agreement, "AGREEMENT_TIMEOUT", timedelta(seconds=1))
        patch.setattr(agreement, "PATIENCE", timedelta(seconds=0.1))
        patch.setattr(agreement, "_sharded_so_far", agreement._sharded_so_far.copy())
        with (
            pytest.warns(match=r"for the ranks \[1.* to shard 0\.up .*have they converted the model\?"),
            pytest.raises(ValueError, match="a rank that is not named did not come"),
        ):
            shard(build(device=device), mesh=mesh)
        patch.undo()
    agreement._sharded_so_far[tuple(range(world))] += 1  # that number is taken in the store


def check_fsdp1_is_refused(rank: int, world: int, device: str, folder: Path) -> None:
    if device == "cuda":  # FSDP1 refuses CPUs itself
        model = FullyShardedDataParallel(build(device=device), device_id=rank)
        with raises("FSDP1"):
            model(batch(0, rank, device))


CHECKS = checks_of(__name__)


@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_gloo(world: int, tmp_path: Path) -> None:
    run_on_ranks(CHECKS, world, "cpu", tmp_path)


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_the_curve_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    for world, part in ((before, train_and_save), (after, resume)):
        run_on_ranks([part], world, "cpu", tmp_path)
        (tmp_path / "rendezvous").unlink(missing_ok=True)
