"""QuantMetrics on a GPU: agreement with the CPU, one transfer a sample and no other wait, memory, torch.compile."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from metrics_fixtures import ALL, assert_measured_as_run, block_example, layer_of
from torch import nn

from halo_train import HaloConfig, QuantMetrics, convert_to_halo_training, ops, quantize
from halo_train.linear import halo_linears
from halo_train.ops import reference

pytestmark = pytest.mark.gpu


def network(recipe: str, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device)
    convert_to_halo_training(model, recipe=recipe)
    return model


RECIPES = ["fp8", "int8", "fp8_plain", "halo0_fp8", "halo1_int8", "halo2_int8", "halo2_fp8"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_agrees_with_the_cpu(recipe, both, monkeypatch):
    """On the same X and E, of dW alone and of both gradients, which on Hopper have scales for blocks. Behind a layer that ran on either
    device X differs by 1e-3, the sums of a float8 GEMM, and so does what is rounded up and what down: 0.3 dB of a product with a few
    large elements, 5 dB of its worst column."""
    generator = torch.Generator().manual_seed(1)
    x = nn.functional.gelu(torch.randn(300, 512, generator=generator))
    x[:, 7] *= 50
    e = torch.randn(300, 272, generator=generator) * torch.exp(torch.randn(300, 1, generator=generator))
    found, in_blocks = [], ops.takes_blocks(torch.empty(0, device="cuda"))
    monkeypatch.setattr(ops, "takes_blocks", lambda e: in_blocks and e.dtype != torch.float64)
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 272)).to(device)
        convert_to_halo_training(model, recipe=recipe)
        metrics = QuantMetrics(model, sample_size=ALL)
        model(x.to(device).requires_grad_(both)).backward(e.to(device))
        metrics.step()
        found.append(metrics.last)
        metrics.close()
    for part, stats in found[0].values["0"].items():
        for stat, value in stats.items():
            # Single values differ by ties; the rotation of columns is undone in float8 sums on the GPU.
            tolerance = {"min_db": 0.5, "bias": 2e-4, "underflow": 1e-3, "saturation": 1e-3}.get(
                stat, 0.1 if stat.endswith("db") else 1e-3 * abs(value)
            )
            assert found[1].values["0"][part][stat] == pytest.approx(value, abs=tolerance), (part, stat)
    for part, shares in found[0].histograms["0"].items():
        assert found[1].histograms["0"][part] == pytest.approx(shares, abs=1e-3), part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (3, 5),
        (64, 2048),
        (65, 2056),
        (1000, 520),
        (300, 4099),
        (40000, 72),
        (1024, 14336),
        (0, 16),
        (16, 0),
    ],
)
def test_moments(dtype, shape):
    """Against float64: sums that the kernel's order changes by 1e-16 of their terms, squares out of the range of float32."""
    scale = 1e-3 if dtype is torch.float16 else 1e-25
    x = (torch.randn(shape, device="cuda") * scale).to(dtype)
    for ours, expected, size in zip(
        ops.moments(x),
        reference.moments(x.double()),
        (x.abs().double().sum(), x.double().square().sum()),
        strict=True,
    ):
        assert ours.shape == expected.shape
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12 * size.item())
    if x.numel():
        assert torch.equal(ops.moments(x)[0][0], x.double().abs().amax(1))


def test_moments_of_views_nan_and_inf():
    x = torch.randn(200, 128, device="cuda").bfloat16()
    for view in (x[:, 3:100], x[::3], x.t(), x[:1].expand(50, 128), x[5:, 8:72]):
        for ours, expected in zip(ops.moments(view), reference.moments(view.double()), strict=True):
            assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-9)
    x[7, 9], x[30, 2] = math.nan, math.inf
    rows, columns = ops.moments(x)
    assert rows[:, 7].isnan().all()
    assert rows[0, 30] == rows[2, 30] == columns[1, 2] == math.inf
    assert columns[:, 9].isnan().all()
    assert rows.isfinite().all(0).sum() == 198
    assert columns.isfinite().all(0).sum() == 126


def agrees_with_the_reference(x, data, scale, largest, counted):
    """Each sum with the terms that it has; exponents to the last element."""
    ours = ops.rounding_moments(x, data, scale, largest, counted)
    expected = reference.rounding_moments(x, data, scale, largest, counted)
    # Sums of values of both signs are as small as they like; the others lose nothing.
    size = x.double().abs().sum().nan_to_num(0, 0, 0).item()
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float64
        assert torch.allclose(a[:, 0], b[:, 0], rtol=1e-10, atol=1e-13 * size, equal_nan=True)
        assert torch.allclose(a[:, 1:], b[:, 1:], rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(ours[2], expected[2])
    return ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(304, 528, 272), (1040, 208, 528), (256, 64, 33)])
@pytest.mark.parametrize("folded", [False, True])
def test_products_have_the_errors_of_the_layers_gradients(folded, shape, dtype):
    """But for those of the sums, and in bfloat16 of rounding the results, a folded dX before it is rotated back."""
    tolerance = 0.1 if dtype == torch.float32 else 0.25
    config = HaloConfig(requantize_w_dgrad=not folded)
    x, w, e = (t.cuda() for t in block_example(*shape, dtype))
    by_columns = ops.takes_blocks(x) and shape[0] <= 4 * shape[1]
    assert_measured_as_run(layer_of(config, x, w), x, e, by_columns, tolerance)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (2, 32, 2048), (5, 33, 2056), (7, 256, 4099), (40, 300, 72), (300, 2, 16), (2, 0, 8)],
)  # fmt: skip
def test_rounding_moments(fmt, dtype, shape):
    """Against float64, with tiny values whose squares leave float32 and rows of zeros."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator)
    x = (x * torch.exp(3 * torch.randn(shape[:2], device="cuda", generator=generator))[..., None]).to(dtype)
    if dtype is not torch.float16:
        x[1:] *= 1e-25
    if shape[1] > 2:
        x[:, 2] = 0
    q = quantize(x, fmt)
    agrees_with_the_reference(
        x, q.data, q.scale, {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}[fmt], 1 + shape[1] // 32
    )


def test_rounding_moments_of_views_nan_and_inf():
    x = torch.randn(6, 40, 128, device="cuda").bfloat16()
    x[1, 3, 7], x[2, 5, 9] = math.nan, math.inf
    q = quantize(x, "e4m3")
    for view in (
        lambda t: t[:, 3:30],
        lambda t: t[1:4, ::3],
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(5, *t.shape[1:]),
    ):
        for columns in (slice(8, 72), slice(3, 100)):
            x_view, data, scale = view(x)[..., columns], view(q.data)[..., columns], view(q.scale)
            agrees_with_the_reference(x_view, data, scale, 448.0, 3)
    of_rows, of_columns, _ = ops.rounding_moments(x, q.data, q.scale, 448.0, 1)
    assert of_rows[1, :4, 3].isnan().all()
    assert of_rows[1, 4, 3] == 128
    assert of_columns[1, :, 7].isnan().all()
    assert of_rows[0].isfinite().all()


def test_exponents_of_every_float():
    """As their bits say, below the normal range of float32 too."""
    orders = torch.arange(-149, 128, dtype=torch.float64)
    x = (
        torch.stack([2**orders, -(2**orders), torch.zeros(277), torch.full((277,), math.inf)])
        .float()
        .cuda()[None]
    )
    q = quantize(x, "int8")
    counts = ops.rounding_moments(x, q.data, q.scale, 127.0, 1)[2]
    assert counts.tolist() == [[2] * 277]


@pytest.mark.parametrize("recipe", ["fp8", "int8", "halo2_fp8"])
def test_waits_for_the_gpu_once_a_sample(recipe):
    model, x = network(recipe, "cuda"), torch.randn(300, 256, device="cuda")
    with QuantMetrics(model, every=1) as metrics:
        model(x).square().mean().backward()
        metrics.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).square().mean().backward()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert metrics.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in caught) == 1


def test_memory_between_forward_and_backward():
    """docs/metrics.md: M (C (b + 2 R) + 4 R + 24) bytes a layer, and the samples that wait to be reduced."""
    tokens, recipes = 8192, 2  # that rotate or equalise
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False)).cuda().bfloat16()
    convert_to_halo_training(model, recipe="fp8")
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    held = []
    for every in (1 << 30, 1):
        metrics = QuantMetrics(model, every=every, what_if=["halo0_fp8", "fp8", "int8"])
        for _ in range(2):
            y = model(x)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            y.backward(y.detach())
            del y
            metrics.step()
        held.append(before)
        metrics.close()
    bound = tokens * (64 * (2 + 2 * recipes) + 4 * recipes + 24)
    waiting = 2 * (2 * 256 * 2048 + 64 * 2048)  # rows of X and W, columns of W
    small = 1 << 20  # statistics, sample indices
    assert held[1] - held[0] <= bound + waiting + small


def test_training_is_the_same_with_and_without():
    results = []
    for every in (0, 3):
        model = network("fp8", "cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        metrics = QuantMetrics(model, every) if every else None
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(300, 256, device="cuda")).square().mean().backward()
            optimizer.step()
            if metrics:
                metrics.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_samples_between_compiled_steps():
    model = network("fp8", "cuda")
    compiled = torch.compile(model, fullgraph=True)
    with QuantMetrics(model, every=2) as metrics:
        for step in range(1, 6):
            compiled(torch.randn(300, 256, device="cuda")).square().mean().backward()
            values = metrics.step()
            assert bool(values) == (step in (1, 2, 4))
            if values:
                assert 20 < values["quant/0/fprop/sqnr_db"] < 50


def llama(layers: int = 2, hidden: int = 256, intermediate: int = 640) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, use_cache=False)
    ).cuda().bfloat16()  # fmt: skip
    assert convert_to_halo_training(model, recipe="fp8").fused
    return model


def backward_of(model: nn.Module, tokens: int = 512) -> torch.Tensor:
    ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss


def test_fused_blocks_are_measured_as_they_are_one_by_one():
    """A forward hook makes the layers run one by one: the same X, W and E but for what the rounding changes downstream."""
    samples = []
    for one_by_one in (False, True):
        model = llama()
        if one_by_one:
            for _, layer in halo_linears(model):
                layer.register_forward_hook(lambda *_: None)
        with QuantMetrics(model, sample_size=ALL) as metrics:
            backward_of(model)
            metrics.step()
        samples.append(metrics.last)
    fused, single = samples
    assert fused.values.keys() == single.values.keys() == dict(halo_linears(model)).keys()
    for layer, parts in fused.values.items():
        for part, stats in parts.items():
            for stat in ("rms", "sqnr_db"):
                if stat in stats:
                    expected = single.values[layer][part][stat]
                    tolerance = 1.0 if stat == "sqnr_db" else 0.1 * expected
                    assert stats[stat] == pytest.approx(expected, abs=tolerance), (layer, part, stat)


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_of_fused_blocks_between_plain_steps(compiled):
    """The blocks' gradients of a sampled step are those of a plain one up to the rounding of h, which had been in bfloat16."""
    model = llama()
    backward_of(model)  # takes the equalisers
    if compiled:
        for block in model.model.layers:
            block.compile(fullgraph=True)
    gradients = []
    with QuantMetrics(model, every=2, start_step=2) as metrics:
        for sampled in (False, True, False, True):
            model.zero_grad()
            backward_of(model)
            gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
            assert bool(metrics.step()) == sampled
    for found in gradients[1:]:
        assert (found - gradients[0]).norm() < 0.1 * gradients[0].norm()
    assert torch.equal(gradients[0], gradients[2])


def test_memory_of_a_sampled_step_of_fused_blocks():
    """docs/metrics.md: what a layer keeps until its backward, and tensors of one block at a time: not h of every block."""
    tokens, hidden, wide, blocks = 8192, 1024, 4096, 8
    model = llama(blocks, hidden, wide)
    backward_of(model, tokens)
    model.zero_grad()
    peaks = []
    with QuantMetrics(model, every=2, start_step=2, layers=["*mlp*"]) as metrics:
        for sampled in (False, True, False, True):
            torch.cuda.reset_peak_memory_stats()
            backward_of(model, tokens)
            model.zero_grad()
            assert bool(metrics.step()) == sampled
            peaks.append(torch.cuda.max_memory_allocated())
    layers, recipes = 3 * blocks, 2
    kept = layers * tokens * (64 * (2 + 2 * recipes) + 4 * recipes + 24)
    of_one_block = tokens * (2 * hidden + 6 * 2 * wide)  # norm, h, their gradients, gate and up once more
    reduced = 12 * 8 * (1 << 24)  # float64 copies of a full stack
    print(f"{peaks[0] / 2**20:.0f} MiB plain, {peaks[1] / 2**20:.0f} and {peaks[3] / 2**20:.0f} sampled")
    assert peaks[3] - peaks[2] <= kept + of_one_block + reduced
