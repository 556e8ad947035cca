"""Shards filled from a Hugging Face directory, by several gloo processes, against transformers' from_pretrained."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from halo_train import HaloConfig, convert_to_halo_training, fsdp
from halo_train.training.distributed import Ranks, callable_in_parts, shard
from halo_train.training.generate import greedy
from halo_train.training.loss import TokenLoss
from halo_train.training.sharded_load import WholeModelNeeded, empty_model, weights_while_used

IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }},
    "gemma2": {"head_dim": 16},  # tied; the embedding's scale is a buffer
    "qwen2": {},  # biases
    "qwen3": {"head_dim": 4, "tie_word_embeddings": True},  # norms of 4: of three ranks one has none
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},  # learnt positions
}  # fmt: skip


def save(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    """A model with random weights, norms and biases too, in several files."""
    transformers.set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | config)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.generation_config.max_new_tokens = 7
    model.to(dtype).save_pretrained(folder / kind, max_shard_size="20KB")
    return folder / kind


def join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    compare(Ranks(rank, ranks, torch.device("cpu")), Path(folder))
    dist.destroy_process_group()


def compare(ranks: Ranks, folder: Path) -> None:
    early_stops = []
    for kind in MODELS:
        for dtype in (torch.float32, torch.bfloat16) if kind == "llama" else (torch.float32,):
            whole = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=dtype)
            whole_loss, loss_of = TokenLoss(whole), TokenLoss(empty_model(folder / kind, dtype))
            model = loss_of.model
            for converted in (whole, model):
                # What FSDP2 gathers in 8 bits has a folded dgrad.
                convert_to_halo_training(converted, recipe=HaloConfig().with_folded_dgrad)
            shard(loss_of, model, ranks, folder / kind)

            expected = dict(whole.named_parameters(remove_duplicate=False))
            found = dict(model.named_parameters(remove_duplicate=False))
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert isinstance(value, DTensor)
                assert value.dtype == dtype
                assert value.requires_grad
                assert torch.equal(value.full_tensor(), expected[name]), (kind, name)
            assert len({id(value) for value in found.values()}) == len(list(whole.parameters()))
            assert any(isinstance(value._local_tensor, fsdp.ShardedWeight) for value in found.values())
            buffers = dict(model.named_buffers())
            assert buffers.keys() == dict(whole.named_buffers()).keys()
            for name, value in whole.named_buffers():
                assert buffers[name].dtype == value.dtype
                assert torch.equal(buffers[name], value), (kind, name)

            value = loss_of(IDS, IDS)
            torch.testing.assert_close(value, whole_loss(IDS, IDS), rtol=0, atol=0)
            value.backward()
            whole_loss(IDS, IDS).backward()
            for name, parameter in model.named_parameters():
                # Summed over processes that have the same batch.
                error = (parameter.grad.full_tensor() / ranks.world_size - expected[name].grad).float().norm()
                assert error <= 0.01 * expected[name].grad.float().norm(), (kind, dtype, name)
        with callable_in_parts(loss_of):
            found = answers(model, ranks)
        assert found == answers(whole)
        # Ranks have finished at different times, and have waited for each other.
        lengths = [max(len(text) for text in found[start : start + 2]) for start in (0, 2, 4)]
        early_stops.append(len(set(lengths)) > 1)
    assert any(early_stops)
    compare_memory(ranks, folder / "large" / "llama")


def answers(model: nn.Module, ranks: Ranks | None = None) -> list[list[int]]:
    """Four batches, which three ranks do not come out even with; texts end early, so ranks wait for each other."""
    prompts = [IDS[0, : 2 + i].tolist() for i in range(7)]
    found = greedy(model, prompts, max_new_tokens=12, stop_ids=range(20), pad_id=0, batch=2, ranks=ranks)
    return found


def compare_memory(ranks: Ranks, path: Path) -> None:
    def shards() -> nn.Module:
        loss_of = TokenLoss(empty_model(path, torch.float32))
        shard(loss_of, loss_of.model, ranks, path)
        return loss_of

    (ours, grown), (whole, grown_whole) = (
        peak_growth(load)
        for load in (shards, lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    )
    assert not any(parameter.is_meta for parameter in ours.parameters())
    size = sum(4 * parameter.numel() for parameter in whole.parameters())
    assert grown < 0.6 * size < size < grown_whole


def peak_growth(build: Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    """What is built, and by how many bytes the resident memory had grown at its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS")
    return build(), resident("VmHWM") - before


def resident(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.slow
def test_shards_are_those_of_the_whole_model_and_need_less_memory(tmp_path: Path) -> None:
    for kind, config in MODELS.items():
        assert len(list(save(tmp_path, kind, **config).glob("*.safetensors"))) > 1
    save(tmp_path / "large", "llama", num_hidden_layers=16, hidden_size=512, intermediate_size=2048)
    mp.spawn(join, args=(3, str(tmp_path)), nprocs=3)


@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_before_the_shards(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, kind, **MODELS[kind])
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = empty_model(path, torch.float32)
    before = list(model.named_parameters(remove_duplicate=False))
    with weights_while_used(model, path):
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert all(
        a is b for (_, a), (_, b) in zip(before, model.named_parameters(remove_duplicate=False), strict=True)
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    with weights_while_used(expected, path):  # left alone
        assert not any(module._forward_hooks for module in expected.modules())
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.config.dtype == expected.config.dtype


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"] = tensors.pop("model.norm.weight")


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def untie(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("llama", rename, r"its files have no model\.norm\.weight"),
        ("llama", shorten, r"model\.norm\.weight is \[31\] in its files and \[32\] in the model"),
        ("llama", untie, "its files have both .*, one weight in the model"),
        ("mixtral", None, "transformers rearranges its weights"),
        ("gpt_neox", None, r"its files have no lm_head\.weight"),
    ],
)
def test_where_reading_is_not_all(tmp_path: Path, kind: str, change, reason: str) -> None:
    path = save(tmp_path, kind, tie_word_embeddings=change is untie)
    if change is not None:
        tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
        change(tensors)
        for file in path.glob("model*"):
            file.unlink()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WholeModelNeeded, match=reason):
        empty_model(path, torch.float32)


def test_float32_modules_quantised_weights_adapters_and_pickles(tmp_path: Path, monkeypatch) -> None:
    path = save(tmp_path, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
        empty_model(path, torch.float32)
        with pytest.raises(WholeModelNeeded, match="transformers keeps norm in float32"):
            empty_model(path, torch.bfloat16)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(WholeModelNeeded, match="an adapter"):
        empty_model(path, torch.float32)
    (path / "adapter_config.json").unlink()
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(WholeModelNeeded, match=r"neither model\.safetensors nor model\.safetensors\.index"):
        empty_model(path, torch.float32)
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WholeModelNeeded, match="quantised"):
        empty_model(path, torch.float32)
