"""The layer on a GPU: products by the library GEMMs, agreement with the CPU reference, memory, streams, training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halo_train import (
    RECIPES,
    HaloLinear,
    Quantized,
    convert_to_halo_training,
    halo_linear,
    ops,
    quantize,
)
from halo_train.gemm import matmul
from halo_train.ops import reference

pytestmark = pytest.mark.gpu

QUANTISED = [name for name in RECIPES if name != "bf16"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


STORED = [torch.int8, torch.float8_e4m3fn]


def exact_operand(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random integers whose sums of products have no more bits than the tensor cores keep."""
    largest = 127 if dtype == torch.int8 else 2
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8, device="cuda").to(dtype)


@pytest.mark.parametrize("fmt", ["e4m3", "int8"])
@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gemm_against_float64(fmt, scaling, dtype):
    a, b = (quantize(torch.randn(rows, 512, device="cuda"), fmt, scaling=scaling) for rows in (304, 192))
    exact = a.dequantize().double() @ b.dequantize().double().t()
    # Fast accumulation of float8 (about 1e-3 at this length) or one rounding of the exact int8 sum.
    bound = max(2e-3 if fmt == "e4m3" else 1e-6, torch.finfo(dtype).eps)
    product = matmul(a, b, dtype)
    assert product.dtype is dtype
    assert relative(product, exact) < bound


@pytest.mark.parametrize("k", [4096, 16384])
def test_fast_sums_are_as_good_as_those_of_the_gpu_library(k):
    a, b = (quantize(torch.randn(rows, k, device="cuda"), "e4m3") for rows in (6144, 4096))
    one = torch.ones((), device="cuda")
    sums = torch._scaled_mm(a.data, b.data.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)
    theirs = sums * a.scale[:, None] * b.scale
    exact = a.dequantize().double() @ b.dequantize().double().t()
    assert relative(matmul(a, b, torch.float32), exact) < 1.01 * relative(theirs, exact)


def test_float8_gemm_of_our_kernel_carries_nan_and_inf():
    a, b = (exact_operand(rows, 64, dtype=torch.float8_e4m3fn) for rows in (4000, 3200))
    a.view(torch.uint8)[3, 5] = 0x7F
    scales = torch.ones(4000, device="cuda"), torch.ones(3200, device="cuda")
    scales[0][7] = float("inf")
    product = ops.scaled_matmul(a, b, *scales, torch.float16)
    assert product[3].isnan().all()
    assert not product[7].isfinite().any()
    assert product.isfinite().all(1).sum() == 3998


def test_gemm_takes_e5m2_gradients():
    a = quantize(torch.randn(64, 256, device="cuda"), "e5m2", scaling="tensorwise")
    b = quantize(torch.randn(32, 256, device="cuda"), "e4m3", scaling="tensorwise")
    exact = a.dequantize().double() @ b.dequantize().double().t()
    assert relative(matmul(a, b, torch.bfloat16), exact) < 5e-3


@pytest.mark.parametrize("m", [1, 16, 17, 40])
@pytest.mark.parametrize("k", [64, 131072 + 64])
def test_int8_gemm_is_exact(m, k):
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (32, k), dtype=torch.int8, device="cuda")
    ones = torch.ones(m, device="cuda"), torch.ones(32, device="cuda")
    product = matmul(Quantized(a, ones[0]), Quantized(b, ones[1]), torch.float64)
    assert torch.equal(product, a.double() @ b.double().t())


SMALL_PRODUCTS = [(1, 16, 16), (17, 48, 64), (300, 208, 528), (129, 272, 4112), (0, 32, 64)]
LARGE_PRODUCTS = [
    (4096, 6144, 512),
    (4097, 4112, 1040),
    (300, 30000, 272),
    (30000, 304, 272),
    (2560, 4096, 4112),
]
"""(m, n, k); the large ones have a tile for every multiprocessor."""


def check_bit_by_bit(stored, m, n, k, dtype, row_scales):
    a, b = (exact_operand(rows, k, dtype=stored) for rows in (m, n))
    scales = [
        torch.rand(rows if vector else (), device="cuda") * 1e-3
        for rows, vector in zip((m, n), row_scales, strict=True)
    ]
    mine = ops.scaled_matmul(a, b, *scales, dtype)
    expected = reference.scaled_matmul(a.cpu(), b.cpu(), *(s.cpu() for s in scales), dtype)
    assert torch.equal(mine.cpu(), expected)


@pytest.mark.parametrize(("m", "n", "k"), [*SMALL_PRODUCTS, *LARGE_PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("row_scales", [(True, True), (True, False), (False, False)])
def test_int8_gemm_equals_the_reference_bit_by_bit(m, n, k, dtype, row_scales):
    check_bit_by_bit(torch.int8, m, n, k, dtype, row_scales)


@pytest.mark.parametrize(("m", "n", "k"), LARGE_PRODUCTS)
@pytest.mark.parametrize(
    ("dtype", "row_scales"),
    [
        (torch.float16, (True, True)),
        (torch.float32, (True, True)),
        (torch.float32, (True, False)),
        (torch.bfloat16, (False, True)),
    ],
)
def test_float8_gemm_of_our_kernel_equals_the_reference_bit_by_bit(m, n, k, dtype, row_scales):
    check_bit_by_bit(torch.float8_e4m3fn, m, n, k, dtype, row_scales)


@pytest.mark.parametrize(
    ("m", "n"), [(8192, 8192), (4096, 2048)]
)  # 2^39 and 2^34 multiplications: long and short
def test_long_and_short_float8_gemms_equal_those_of_int8_bit_by_bit(m, n):
    a, b = (exact_operand(rows, n, dtype=torch.float8_e4m3fn) for rows in (m, n))
    scales = [torch.rand(rows, device="cuda") * 1e-3 for rows in (m, n)]
    product = ops.scaled_matmul(a, b, *scales, torch.bfloat16)
    a, b = (x.float().to(torch.int8) for x in (a, b))
    assert torch.equal(product, ops.scaled_matmul(a, b, *scales, torch.bfloat16))


@pytest.mark.parametrize("offset", [16, 3])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_gemm_of_strided_operands(offset, by_columns, stored):
    wide = exact_operand(2, 3000, 1024, dtype=stored)
    a, b = wide[0, :, offset : offset + 512], wide[1, :2880, offset : offset + 512]
    if by_columns:  # dense, but along columns
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    ones = torch.ones(3000, device="cuda"), torch.ones(2880, device="cuda")
    assert torch.equal(ops.scaled_matmul(a, b, *ones, torch.float32).double(), a.double() @ b.double().t())


def test_int8_gemm_with_the_longest_contraction_and_largest_sums():
    a = torch.full((130, reference.INT8_MAX_CONTRACTION), -127, dtype=torch.int8, device="cuda")
    one = torch.ones((), device="cuda")
    product = ops.scaled_matmul(a, a[:48], one, one, torch.float32)
    assert torch.equal(product, torch.full_like(product, 127.0 * 127.0 * reference.INT8_MAX_CONTRACTION))


@pytest.mark.parametrize("stored", STORED)
def test_gemm_in_a_cuda_graph_and_again(stored):
    a, b = (exact_operand(rows, 4096, dtype=stored) for rows in (4000, 2064))
    scales = torch.rand(4000, device="cuda") * 1e-3, torch.rand(2064, device="cuda")
    expected = ops.scaled_matmul(a, b, *scales, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.scaled_matmul(a, b, *scales, torch.float16)
    for _ in range(20):  # any order of the thread blocks
        graph.replay()
        assert torch.equal(captured, expected)
    a.copy_(a.view(torch.uint8).flip(0).view(stored))
    graph.replay()
    assert torch.equal(captured, ops.scaled_matmul(a, b, *scales, torch.float16))


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize(("m", "n", "k"), [(512, 256, 384), (100, 48, 33), (1, 16, 512), (17, 130, 100)])
def test_layer_is_as_accurate_as_the_cpu_reference(recipe, m, n, k, monkeypatch):
    config = RECIPES[recipe]
    in_blocks = ops.takes_blocks(torch.empty(0, device="cuda"))
    monkeypatch.setattr(ops, "takes_blocks", lambda e: in_blocks)
    g = torch.Generator().manual_seed(0)
    x, w, b, e = (torch.randn(s, generator=g).bfloat16() for s in ((m, k), (n, k), (n,), (m, n)))
    d = torch.exp2(torch.randint(-3, 4, (k,), generator=g).float()) if config.equalize else None
    exact = [
        x.double() @ w.double().t() + b.double(),
        e.double() @ w.double(),
        e.double().t() @ x.double(),
        e.double().sum(0),
    ]
    errors = {}
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, w, b)]
        y = halo_linear(*leaves, config=config, equalizer=None if d is None else d.to(device))
        grads = torch.autograd.grad(y, leaves, e.to(device))
        assert y.device.type == device
        errors[device] = [relative(mine.cpu(), true) for mine, true in zip((y, *grads), exact, strict=True)]
    # Both round the same values to the same 8 bits, up to ties; fast accumulation comes on top on the GPU.
    for name, cpu, cuda in zip(("y", "dx", "dw", "db"), errors["cpu"], errors["cuda"], strict=True):
        assert cuda <= 1.1 * cpu + 1e-3, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy_against_float64(recipe, dtype):
    x, w, e = (torch.randn(s, device="cuda").to(dtype) for s in ((1024, 512), (768, 512), (1024, 768)))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    config = RECIPES[recipe]
    y = halo_linear(
        *leaves, config=config, equalizer=torch.ones(512, device="cuda") if config.equalize else None
    )
    grads = torch.autograd.grad(y, leaves, e)
    exact = (x.double() @ w.double().t(), e.double() @ w.double(), e.double().t() @ x.double())
    bound = {"bf16": 5e-3}.get(recipe, 0.045 if "fp8" in recipe else 0.02)
    assert all(relative(mine, true) < bound for mine, true in zip((y, *grads), exact, strict=True))


def test_equalizer_factors_are_exact():
    exponent = torch.arange(-126, 127, dtype=torch.int8)
    for mine, true in zip(
        ops.equalizer_factors(exponent.cuda()), reference.equalizer_factors(exponent), strict=True
    ):
        assert torch.equal(mine.cpu(), true)


def test_saved_memory_is_one_byte_per_element():
    layer = HaloLinear(2048, 2048, bias=False, device="cuda", dtype=torch.bfloat16, recipe="fp8")
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    # Xq with its row scales and d; dgrad rounds the weight itself. The allocator rounds each to 512 bytes.
    assert saved <= 4096 * 2048 + (4096 + 2048) * 4 + 3 * 512


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_forward_and_backward_never_wait_for_the_gpu(recipe):
    layer = HaloLinear(256, 256, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    layer.reset_equalizer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_and_side_stream():
    layer = HaloLinear(128, 64, device="cuda")
    x = torch.randn(32, 128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = layer(x)
        torch.cuda.current_stream().wait_stream(stream)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain", "halo1_fp8"])
def test_cuda_graph_of_forward_and_backward(recipe):
    layer = HaloLinear(256, 192, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], e))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x) * 3)
        layer.weight.mul_(0.5)
        layer.equalizer_exponent.add_(torch.arange(256, device="cuda") % 2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain", "halo1_fp8"])
def test_compiled_without_graph_breaks(recipe):
    layer = HaloLinear(256, 192, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    e = torch.randn(2, 64, 192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)  # takes the equalizer
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], e)))
    for eager, compiled in zip(*results, strict=True):
        # Inductor keeps float32 between operations that eager mode rounds to bfloat16 one by one.
        assert relative(compiled, eager) < 3e-3


def test_results_are_the_same_from_run_to_run():
    layer = HaloLinear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn_like(x)
    first = None
    for _ in range(5):
        y = layer(x)
        found = (y, *torch.autograd.grad(y, [x, layer.weight], e))
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_come_out(recipe, bad):
    """In X they poison their token of Y, in E their token of dX and their row of dW."""
    layer = HaloLinear(256, 192, bias=False, device="cuda", dtype=torch.bfloat16, recipe=recipe)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(64, 192, device="cuda", dtype=torch.bfloat16)
    layer(x)
    with torch.no_grad():
        broken = x.clone()
        broken[5, 7] = bad
        y = layer(broken)
    assert not y[5].isfinite().any()
    assert y[torch.arange(64) != 5].isfinite().all()
    e[9, 3] = bad
    dx, dw = torch.autograd.grad(layer(x), [x, layer.weight], e)
    assert not dx[9].isfinite().any()
    assert not dw[3].isfinite().any()
    assert dx[torch.arange(64) != 9].isfinite().all()


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "int8", "fp8_plain", "halo2_int8"])
def test_a_small_network_learns(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda()
    target = nn.Linear(64, 64).cuda()
    convert_to_halo_training(model, recipe=recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        x = torch.randn(512, 64, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (model(x).float() - target(x).float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("recipe", ["fp8", "int8", "halo2_fp8"])
def test_the_second_gpu_while_the_first_is_current(recipe):
    assert torch.cuda.current_device() == 0
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        x, weight, e = (torch.randn(s).bfloat16().to(device) for s in ((64, 256), (128, 256), (64, 128)))
        leaves = x.requires_grad_(), weight.requires_grad_()
        y = halo_linear(*leaves, config=RECIPES[recipe])
        results.append([t.cpu() for t in (y, *torch.autograd.grad(y, leaves, e))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
