"""Fused blocks on a GPU: the values of a CPU, the layers one by one, compiled, and captured as a CUDA graph."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from test_recognise import IDS, build, convert, relative, step
from torch import Tensor, nn

from halo_train import equalizer_state_dict, load_equalizer_state_dict
from halo_train.config import Recompute
from halo_train.training.blocks import checkpoint_activations, compile_blocks

pytestmark = pytest.mark.gpu

FIELDS = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
}


def model_on(device: str, kind: str, recipe: str, fuse: bool = True) -> nn.Module:
    return convert(build(kind, **FIELDS).bfloat16(), recipe, fuse=fuse)[0].to(device)


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Phi"])
def test_gpu_and_cpu_agree(kind: str, recipe: str) -> None:
    ids = torch.randint(1, 512, (2, 77), generator=torch.Generator().manual_seed(0))
    exact = step(build(kind, **FIELDS), ids)
    cpu, gpu = model_on("cpu", kind, recipe), model_on("cuda", kind, recipe)
    apart = model_on("cuda", kind, recipe, fuse=False)
    want = step(cpu, ids)
    for each in (gpu, apart):
        load_equalizer_state_dict(each, equalizer_state_dict(cpu))
    mine, other = ([t.cpu() for t in step(each, ids.cuda())] for each in (gpu, apart))
    assert relative(mine[0], want[0]) < 2e-3
    # All of them are off by the rounding; the fused one not further.
    assert relative(mine[1], want[1]) < 1.5 * relative(want[1], exact[1])
    assert relative(mine[1], exact[1]) < 1.1 * relative(other[1], exact[1])


@pytest.mark.parametrize("kind", ["Llama", "Phi"])
def test_compiled(kind: str) -> None:
    model = model_on("cuda", kind, "fp8")
    expected = step(model, IDS.cuda())
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    loss, grad = step(model, IDS.cuda())
    assert relative(loss, expected[0]) < 2e-3
    assert relative(grad, expected[1]) < 0.1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_keeping_less_gives_the_same_bits(recipe: str, compiled: bool) -> None:
    results, kept = [], []
    ids = torch.randint(1, 512, (4, 1024), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for recompute in Recompute:
        model = convert(build("Llama", **FIELDS).bfloat16(), recipe, recompute=recompute)[0].cuda()
        step(model, ids)
        torch._dynamo.reset()
        if compiled:
            compile_blocks(model)
        step(model, ids)
        model.zero_grad()  # else this is another micro-batch, which keeps rounded weights
        gc.collect()  # the model before: compiled it is part of cycles, and would be given back in between
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # Two layers of 4096 tokens: two norms of 256 and h of 896 in 8 bits; gate and up in bfloat16.
    assert kept[0] - kept[1] > 0.95 * 2 * 4096 * (2 * 256 + 896)
    assert kept[1] - kept[2] > 0.95 * 2 * 4096 * 4 * 896


def test_compiled_recomputation_keeps_as_little_as_eager() -> None:
    kept = []
    for compiled in (False, True):
        model = model_on("cuda", "Llama", "fp8")
        step(model, IDS.cuda())
        model.zero_grad()
        checkpoint_activations(model, "full")
        torch._dynamo.reset()
        if compiled:
            compile_blocks(model)
        ids = torch.randint(1, 512, (4, 1024), device="cuda")
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            hidden = model.model(input_ids=ids).last_hidden_state
            kept.append(torch.cuda.memory_allocated() - before)
            hidden.float().square().mean().backward()
            model.zero_grad()
            del hidden
    assert kept[3] < 1.1 * kept[1]


def test_cuda_graph() -> None:
    model = model_on("cuda", "Llama", "fp8").model.layers[0]
    x = torch.randn(2, 64, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    angle = torch.randn(2, 64, 64, dtype=torch.bfloat16, device="cuda")
    rotary = angle.cos(), angle.sin()

    def run(inputs: Tensor) -> tuple[Any, ...]:
        y = model(inputs, position_embeddings=rotary)
        return y, *torch.autograd.grad(y, [inputs, *model.parameters()], torch.ones_like(y))

    twin = copy.deepcopy(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(twin)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(twin)
    with torch.no_grad():
        twin.copy_(x * 2)
    graph.replay()
    for replayed, eager in zip(captured, run((x * 2).detach().requires_grad_()), strict=True):
        assert torch.equal(replayed, eager)
