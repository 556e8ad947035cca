"""Activation checkpointing and compilation of decoder layers: same bits, less memory, no product twice."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import metrics, run_in_two_parts, write_run

from halo_train import RECIPES, convert_to_halo_training
from halo_train.recipes import finetune
from halo_train.training.blocks import blocks, checkpoint_activations, compile_blocks
from halo_train.training.config import load_config
from halo_train.training.errors import UserError
from halo_train.training.loss import TokenLoss
from halo_train.training.precision import convert

LLAMA = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, attention_dropout=0.1,
)  # fmt: skip
IDS = torch.randint(1, 128, (2, 32), generator=torch.Generator().manual_seed(0))


def build(recipe: str) -> TokenLoss:
    transformers.set_seed(0)
    loss = TokenLoss(transformers.AutoModelForCausalLM.from_config(LLAMA)).train()
    convert_to_halo_training(loss.model, recipe=recipe)
    return loss


def two_steps(loss: TokenLoss) -> list[torch.Tensor]:
    """Losses and gradients of the first batch, which the equaliser is taken from, and of another."""
    torch.manual_seed(1)
    results = []
    for ids in (IDS, IDS.flip(1)):
        value = loss(ids, ids)
        value.backward()
        results += [value.detach(), *(p.grad for p in loss.parameters())]
        loss.zero_grad()
    return results


@pytest.mark.parametrize("recipe", ["fp8", "int8", "halo2_int8", "bf16"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_gives_the_same_bits(recipe: str, mode: Any) -> None:
    expected = two_steps(build(recipe))
    loss = build(recipe)
    checkpoint_activations(loss.model, mode)
    for value, exact in zip(two_steps(loss), expected, strict=True):
        assert torch.equal(value, exact)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[op.name()] += 1
        return op(*args, **(kwargs or {}))


def test_what_is_computed_twice() -> None:
    """3 blocks with 7 layers each, whose products round the weights; besides the input of o, two norms and h are rounded. full repeats
    all, selective h, and without either the input of o is rounded again, which attention keeps."""
    counts = {}
    for mode in ("none", "selective", "full"):
        loss = build("int8")
        if mode != "none":
            checkpoint_activations(loss.model, mode)  # type: ignore[arg-type]
        two_steps(loss)  # the equaliser is there
        with Count() as counts[mode]:
            loss(IDS, IDS).backward()

    def of(op: str) -> list[int]:
        return [counts[mode].ops[f"halo_train::{op}"] for mode in ("none", "selective", "full")]

    assert of("quantize_rows") == [6, 3, 6]
    assert of("matmul_weight_rows") == [21, 21, 42]
    assert of("norm_quantize") == [6, 6, 12]
    assert of("gated_quantize") == [3, 6, 6]
    assert of("matmul_weight_columns") == of("matmul_rotated") == [21, 21, 21]


def test_what_is_kept() -> None:
    """Bytes that live until backward, besides the parameters; float32 weights under bfloat16 autocast."""
    kept = {}
    for mode in ("none", "selective", "full"):
        loss = build("int8")
        two_steps(loss)
        if mode != "none":
            checkpoint_activations(loss.model, mode)  # type: ignore[arg-type]
        tracker = MemTracker()
        tracker.track_external(loss)
        with tracker:
            value = loss(IDS, IDS)
            snapshot = tracker.get_tracker_snapshot("current")
            value.backward()
        kept[mode] = snapshot[torch.device("cpu")][_MemRefType.ACT]
    # Of a block: its input in float32; selective the outputs of two norms and the input of o in 8 bits, and the outputs of seven
    # products and of attention, too.
    tokens, hidden, inner = IDS.numel(), 64, 160
    inputs = 3 * tokens * hidden * 4
    selective = 3 * tokens * (3 * hidden + 2 * hidden + 2 * (4 * hidden + 2 * inner))
    outside = kept["full"] - inputs
    assert 0 < outside < 0.1 * kept["none"]  # the loss
    assert kept["selective"] == pytest.approx(outside + inputs + selective, rel=0.1)
    assert kept["selective"] < 0.5 * kept["none"]


@pytest.mark.parametrize("fuse", [True, False])
def test_the_switch_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], fuse: bool) -> None:
    config = load_config(write_run(tmp_path), [f"quant.fuse={str(fuse).lower()}"])
    model = transformers.AutoModelForCausalLM.from_config(LLAMA)
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    report = convert(model, {"*": RECIPES["fp8"]}, config, tmp_path)
    assert len(report.fused) == (7 if fuse else 0)
    printed = capsys.readouterr().out
    assert (
        "7 parts of blocks run fused; one by one:\n  model.layers.0.mlp: its activation ReLU" in printed
    ) is fuse
    assert len(json.loads((tmp_path / "conversion.json").read_text())["fused"]) == len(report.fused)
    # Where nothing is rounded nothing is fused either, which needs no list of reasons.
    convert(transformers.AutoModelForCausalLM.from_config(LLAMA), {"*": RECIPES["bf16"]}, config, tmp_path)
    assert "fused" not in capsys.readouterr().out


WITHOUT_BLOCKS = nn.Sequential(nn.Linear(4, 4))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.compile=true needs a model made of .*; Sequential has none"):
        compile_blocks(WITHOUT_BLOCKS)
    with pytest.raises(UserError, match=r"train\.activation_checkpointing=full needs"):
        checkpoint_activations(WITHOUT_BLOCKS, "full")


def test_blocks_are_the_outermost() -> None:
    model = build("bf16").model
    assert [id(block) for block in blocks(model, "")] == [id(layer) for layer in model.model.layers]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_run_with_recomputation_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    overrides = [f"train.activation_checkpointing={mode}"]
    whole, parts = run_in_two_parts(tmp_path, overrides, monkeypatch)
    plain = tmp_path / "plain"
    plain.mkdir()
    finetune.run(load_config(write_run(plain)))
    assert metrics(whole) == metrics(parts) == metrics(plain / "runs" / "tiny")


def test_sampling_the_error_changes_nothing(tmp_path: Path) -> None:
    """Its own rounding in forward must not be taken for that of the layers, which backward would use."""
    lines = {}
    for mode in ("none", "selective"):
        folder = tmp_path / mode
        folder.mkdir()
        overrides = [f"train.activation_checkpointing={mode}", "log.quant_every=1", "train.steps=2"]
        finetune.run(load_config(write_run(folder), overrides))
        run = folder / "runs" / "tiny"
        lines[mode] = metrics(run), (run / "quant.jsonl").read_text()
    assert lines["none"] == lines["selective"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """Traced with autograd, not lowered to C++, which takes minutes: one graph serves all blocks, with the same bits."""
    monkeypatch.setattr(LLAMA, "attention_dropout", 0.0)  # compiled code draws other random numbers
    expected, loss = two_steps(build("fp8")), build("fp8")
    with torch.no_grad():
        loss(IDS, IDS)  # the equaliser
    if mode != "none":
        checkpoint_activations(loss.model, mode)
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs, fullgraph=True))
    torch._dynamo.reset()
    compile_blocks(loss.model)
    for value, exact in zip(two_steps(loss), expected, strict=True):
        assert torch.equal(value, exact)
    assert graphs.frame_count == 1
