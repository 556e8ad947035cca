"""QuantMetrics under FSDP2: each rank measures its own tokens against the gathered weight."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fsdp_fixtures import checks_of, run_on_ranks
from metrics_fixtures import ALL, measure, toy
from torch import nn
from torch.distributed.fsdp import fully_shard

from halo_train import RECIPES, QuantMetrics, agreement, convert_to_halo_training
from halo_train.linear import halo_linears


def tokens_of(rank: int) -> torch.Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(rank))


def check_layers_of_one_unit_and_units_of_one_layer(rank: int, world: int, device: str, folder: Path) -> None:
    reference = toy(RECIPES["fp8"].with_folded_dgrad)  # a gathered weight has no columns
    with torch.no_grad():
        reference(torch.cat([tokens_of(r) for r in range(world)]))  # the equalizers of all ranks' tokens
    expected = measure(reference, tokens_of(rank), what_if=["int8"])
    for units in ((), (0, 2)):
        model = toy("fp8")
        for unit in units:
            fully_shard(model[unit])
        fully_shard(model)
        found = measure(model, tokens_of(rank), what_if=["int8"])
        assert list(found) == ["0", "2"]
        for layer in found:
            for part in found[layer]:
                assert found[layer][part] == pytest.approx(expected[layer][part], rel=1e-6), (layer, part)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
                    num_key_value_heads=1, head_dim=16, use_cache=False)
    )  # fmt: skip
    assert convert_to_halo_training(model, recipe="fp8").fused
    return model


def batch_of(rank: int) -> torch.Tensor:
    return torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(rank))


def check_fused_blocks(rank: int, world: int, device: str, folder: Path) -> None:
    reference, model = llama(), llama()
    for _, layer in halo_linears(reference):
        layer.config = layer.config.with_folded_dgrad
    with torch.no_grad():
        reference(torch.cat([batch_of(r) for r in range(world)]))
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    samples = []
    for network in (reference, model):
        with QuantMetrics(network, every=1, sample_size=ALL, what_if=["int8"]) as metrics:
            for _ in range(2):
                network(input_ids=batch_of(rank), labels=batch_of(rank)).loss.backward()
                assert metrics.step()
                samples.append(metrics.last.values)
    for step in (0, 1):
        expected, found = samples[step], samples[2 + step]
        assert expected.keys() == found.keys()
        for layer, parts in found.items():
            for part, stats in parts.items():
                for stat in ("amax", "rms", "sqnr_db"):
                    if stat in stats:
                        assert stats[stat] == pytest.approx(expected[layer][part][stat], rel=1e-3), (
                            layer,
                            part,
                        )


def check_metrics_on_one_rank_only(rank: int, world: int, device: str, folder: Path) -> None:
    model = fully_shard(toy("fp8"))
    if rank == 0:  # and no other, which would wait for it in its forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agreement, "AGREEMENT_TIMEOUT", timedelta(seconds=1))
            patch.setattr(agreement, "PATIENCE", timedelta(seconds=0.1))
            _, layer = next(halo_linears(model))
            with (
                pytest.warns(
                    match=r"waiting .* for the ranks \[1\] to read the whole weight .* must be on every rank"
                ),
                pytest.raises(RuntimeError, match=r"not all of the ranks \[0, 1\] came"),
            ):
                layer.whole_weight()


def test_two_ranks(tmp_path):
    run_on_ranks(checks_of(__name__), 2, "cpu", tmp_path)
