"""A step of converted models under FSDP2: the bits of one rank, what is sent, gradients and optimisers, meshes, mixed precision.

gloo on the CPU; on GPUs tests/test_fsdp_nccl.py runs the same checks.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_fixtures import (
    WIDTH,
    alone,
    assert_gathered_bits,
    batch,
    build,
    checks_of,
    folding_dgrad,
    full,
    run_on_ranks,
    shard,
    weights_seen,
    whole_batch,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from halo_train import (
    collect_equalizers,
    convert_to_halo_training,
    equalizer_state_dict,
    fsdp,
    operands,
    products,
)
from halo_train.linear import halo_linears
from halo_train.operands import quantize_weight


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


def check_even_shards_have_the_hook_of_five_arguments(
    rank: int, world: int, device: str, folder: Path
) -> None:
    block = shard(build("fp8", device=device))[0]
    for layer in (block.up, block.odd, block.few, block.down):
        hook = layer.weight._local_tensor.fsdp_pre_all_gather
        expected = 1 if layer.out_features % world else 5
        assert len(inspect.signature(hook).parameters) == expected, layer


def check_the_wire_carries_one_byte_a_weight(rank: int, world: int, device: str, folder: Path) -> None:
    if world == 1:
        return  # nothing is sent
    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    from wire import bytes_sent

    sent, reduced = {}, {}
    for recipe in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Sequential(nn.Linear(768, 96 * world, bias=False)) for _ in range(2)]
        ).bfloat16()
        convert_to_halo_training(model, recipe=recipe)
        model = shard(model.to(device))
        x = torch.randn(16, 768, device=device, dtype=torch.bfloat16)
        reduced[recipe] = []
        for _ in range(2):
            with bytes_sent() as counts:
                model[0](x).sum().backward()
            reduced[recipe].append(counts)
        sent[recipe] = counts
    assert 0.5 < sent["fp8"]["all_gather"] / sent["bf16"]["all_gather"] < 0.51, sent
    assert sent["fp8"]["reduce_scatter"] == sent["bf16"]["reduce_scatter"] > 0
    with bytes_sent() as counts, collect_equalizers(model):
        model[0](x)
    assert counts["all_reduce"] == 2 * 4 * 768  # of the other layer, which has none yet
    # Two floats a column, when the factors are taken and never after.
    assert [counts["all_reduce"] for counts in reduced["fp8"]] == [2 * 4 * 768, 0]
    assert [counts["all_reduce"] for counts in reduced["bf16"]] == [0, 0]


def check_collected_factors_are_those_of_one_rank(rank: int, world: int, device: str, folder: Path) -> None:
    batches = [batch(step, 0, device) for step in range(2 * world)]
    batches[-1] = batches[-1][:0]  # a rank without tokens in one of its batches
    reference = folding_dgrad(build("int8", device=device))
    with collect_equalizers(reference):
        for x in batches:
            reference(x)
    expected = equalizer_state_dict(reference)
    assert any(exponent.any() for exponent in expected.values())
    variants: list[dict[str, Any]] = [{}, {"reshard_after_forward": False}]
    if world == 4:
        variants.append({"mesh": init_device_mesh(device, (2, 2), mesh_dim_names=("replicate", "shard"))})
    if device == "cuda":
        variants.append({"offload_policy": CPUOffloadPolicy()})
    for kwargs in variants:
        model = shard(build("int8", device=device), **kwargs)
        for _ in range(2):  # again where weights may be gathered, rounded with the factors before
            with collect_equalizers(model):
                for x in batches[rank::world]:
                    model(x)
            found = equalizer_state_dict(model)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], exponent) for name, exponent in expected.items()), kwargs
            with weights_seen(model) as seen:
                y = model(batches[0])
            assert torch.equal(y, reference(batches[0])), kwargs
            if "offload_policy" not in kwargs:
                assert_gathered_bits(model, seen)
            for _, layer in halo_linears(model):
                layer.reset_equalizer()


def check_backward_keeps_what_fsdp_keeps(rank: int, world: int, device: str, folder: Path) -> None:
    """Of weights whose rows are no multiple of 16 too: what is padded is not kept beside what was gathered, which FSDP2 frees."""
    model = shard(build(device=device))
    x = torch.randn(64, WIDTH, device=device).requires_grad_()
    model(x)  # takes the factors
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    weights = [t for t in saved if t.dtype == torch.float8_e4m3fn and len(x) not in t.shape]
    assert [len(t) for t in weights[:3]] == [96, 33, 4]
    assert len(weights) == len(list(halo_linears(model)))
    assert all(t.untyped_storage().size() == 0 for t in weights)
    y.sum().backward()


def check_a_shard_is_rounded_once_for_a_gather(rank: int, world: int, device: str, folder: Path) -> None:
    rounded: list[torch.Size] = []

    def counting(weight: torch.Tensor, *rest: Any) -> Any:
        rounded.append(weight.shape)
        return quantize_weight(weight, *rest)

    for reshard, gathers in ((True, 2), (False, 1)):
        model = shard(build(device=device), reshard_after_forward=reshard)
        model(batch(0, rank, device)).sum().backward()  # takes the factors, for which it gathers once more
        with pytest.MonkeyPatch.context() as patch:
            # Whoever rounds a weight calls one of these.
            patch.setattr(fsdp, "quantize_weight", counting)
            patch.setattr(products, "quantize_weight", counting)
            patch.setattr(operands, "quantize_weight", counting)
            model(batch(0, rank, device)).sum().backward()
        layers = [layer for _, layer in halo_linears(model)]
        assert sorted(rounded) == sorted(
            torch.Size((-(-layer.out_features // world), layer.in_features)) for layer in layers * gathers
        )
        rounded.clear()


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
    ways: dict[str, Any] = {
        "every time": lambda model, last: None,
        "at the end": lambda model, last: model.set_requires_gradient_sync(last),
        "gathered until the end": lambda model, last: (
            model.set_requires_gradient_sync(last),
            model.set_reshard_after_backward(last),
        ),
    }
    mesh = init_device_mesh(device, (world,))
    if world >= 4:
        mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("replicate", "shard"))
        ways["summed over replicas at the end"] = lambda model, last: model.set_requires_all_reduce(last)
    expected: list[torch.Tensor] = []
    for way, prepare in ways.items():
        model = shard(build(device=device), mesh=mesh)
        for step in range(3):
            prepare(model, step == 2)
            model(batch(step, rank, device)).square().mean().backward()
        found = [p.grad.full_tensor() for p in model.parameters()]
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, msg=way)


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
    if world in (4, 8):
        meshes["HSDP"] = init_device_mesh(device, (2, world // 2), mesh_dim_names=("replicate", "shard"))
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
        if "mesh" in kwargs:  # norms and all other weights are those of the other replicas
            for name, p in model.named_parameters():
                largest = p.to_local().detach().clone()
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=kwargs["mesh"].get_group("replicate"))
                assert torch.equal(largest, p.to_local()), name
        with weights_seen(model) as seen:
            model(batch(1, rank, device))
        if "offload_policy" not in kwargs:
            assert_gathered_bits(model, seen)


def check_mixed_precision_rounds_the_master_weights(rank: int, world: int, device: str, folder: Path) -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for policy, dtype in (
        (MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32), bf16),
        (MixedPrecisionPolicy(param_dtype=fp16, reduce_dtype=fp32), fp16),
        (MixedPrecisionPolicy(reduce_dtype=bf16), fp32),
        (MixedPrecisionPolicy(param_dtype=bf16, output_dtype=fp32), fp32),
    ):
        model = shard(build(device=device), mp_policy=policy)
        with weights_seen(model) as seen:
            y = model(batch(0, rank, device))
        assert y.dtype is dtype, policy
        y.float().square().mean().backward()
        assert all(p.dtype is p.grad.dtype is fp32 for p in model.parameters())
        assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters()), policy
        assert_gathered_bits(model, seen)


def check_float64(rank: int, world: int, device: str, folder: Path) -> None:
    if device == "cpu":
        model = shard(build(dtype=torch.float64))
        with weights_seen(model) as seen:
            y = model(batch(0, rank, device, torch.float64))
        assert torch.equal(
            y, alone("fp8", device, world, torch.float64)(batch(0, rank, device, torch.float64))
        )
        y.square().mean().backward()
        assert_gathered_bits(model, seen)


CHECKS = checks_of(__name__)
WORLD_SIZE_MATTERS = [
    check_collected_factors_are_those_of_one_rank,
    check_backward_keeps_what_fsdp_keeps,
    check_one_step_has_the_bits_of_one_rank,
    check_a_rank_without_tokens,
    check_sharding_variants,
    check_gradient_accumulation,
]


@pytest.mark.parametrize("world", [2, 3])
def test_gloo(world: int, tmp_path: Path) -> None:
    run_on_ranks(CHECKS, world, "cpu", tmp_path)


@pytest.mark.parametrize(
    "world", [1, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_other_world_sizes(world: int, tmp_path: Path) -> None:
    run_on_ranks(WORLD_SIZE_MATTERS, world, "cpu", tmp_path)
