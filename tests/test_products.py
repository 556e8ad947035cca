"""The 8-bit products that round a weight on the way or rotate their result: the bits of the steps one by one, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halo_train import ops
from halo_train.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.float8_e4m3fn, torch.int8]
OUTPUTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rounded(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return ops.quantize_rows(torch.randn(rows, columns).to(device), dtype)


def exact(data: Tensor, scale: Tensor) -> Tensor:
    return data.double() * scale.double()[:, None]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("layout", ["dense", "every second row", "transposed"])
def test_a_weight_rounded_on_the_way_has_the_bits_of_one_rounded_before(device, dtype, out_dtype, layout):
    weight = torch.randn(96, 64, dtype=torch.bfloat16, device=device)
    if layout != "dense":
        weight = weight[::2] if layout == "every second row" else weight.t()
    n, k = weight.shape
    d = torch.exp2(torch.randint(-3, 4, (k,), device=device).float())
    a, u = rounded(48, k, dtype, device)
    block = k & -k
    rows, columns = ops.quantize_rows, ops.quantize_rows_transposed
    if out_dtype == torch.float64:  # the reference on every device
        rows, columns = reference.quantize_rows, reference.quantize_rows_transposed
    data, scale = rows(weight, dtype, block, d)
    expected = ops.scaled_matmul(a, data, u, scale, out_dtype)
    product, found_scale = ops.matmul_weight_rows(a, u, weight, block, d, out_dtype)
    assert torch.equal(product, expected)
    assert torch.equal(found_scale, scale)
    assert expected.shape == (48, n)
    assert expected.dtype is out_dtype
    a, u = rounded(48, n, dtype, device)
    for factors in (None, torch.rand(n, device=device) + 0.5):
        data, c = columns(weight, dtype, factors)
        expected = ops.scaled_matmul(a, data, u, c, out_dtype)
        assert torch.equal(ops.matmul_weight_columns(a, u, weight, factors, dtype, out_dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_columns_of_a_weight_have_a_format_of_their_own(device, gradients):
    weight = torch.randn(64, 48, dtype=torch.bfloat16, device=device)
    a, u = rounded(32, 64, gradients, device)
    c = ops.quantize_rows_transposed(weight, torch.float8_e4m3fn)
    product = ops.matmul_weight_columns(a, u, weight, None, torch.float8_e4m3fn, torch.float32)
    assert relative(product, exact(a, u) @ exact(*c).t()) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_result_is_rotated_and_scaled(device, dtype, out_dtype, block, with_factors):
    (a, u), (b, v) = rounded(48, 64, dtype, device), rounded(96, 64, dtype, device)
    d = torch.exp2(torch.randint(-3, 4, (96,), device=device).float()) if with_factors else None
    y = ops.matmul_rotated(a, b, u, v, False, block, d, out_dtype)
    assert torch.equal(y, ops.matmul_rotated(a, ops.transpose_bytes(b), u, v, True, block, d, out_dtype))
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    blocks = torch.block_diag(*[h / math.sqrt(block)] * (96 // block)).to(device)
    expected = exact(a, u) @ exact(b, v).t() @ blocks
    assert relative(y, expected if d is None else expected * d) < max(2e-3, 2 * torch.finfo(out_dtype).eps)
    assert y.dtype is out_dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("column_scales", [False, True])
def test_a_product_over_rows_has_scales_of_columns(device, dtype, column_scales):
    (a, u), (b, _) = rounded(48, 32, dtype, device), rounded(32, 64, dtype, device)
    v = torch.rand(64, device=device) if column_scales else torch.tensor(0.5, device=device)
    y = ops.matmul_rows(a, b, u, v, torch.float32)
    assert relative(y, exact(a, u) @ b.double() * v) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_opcheck(device, dtype):
    weight, d = torch.randn(32, 64, device=device), torch.ones(64, device=device)
    (a, u), (b, v), (e, t) = (rounded(16, n, dtype, device) for n in (64, 64, 32))
    namespace, out = torch.ops.halo_train, torch.bfloat16
    # The check of the schema compares the arguments before and after, for which float8 has no arithmetic.
    utils = [
        "test_autograd_registration",
        "test_faketensor",
        *(["test_schema"] if dtype == torch.int8 else []),
    ]

    def check(op, *args):
        torch.library.opcheck(op, args, test_utils=utils)

    if dtype != torch.int8:
        check(namespace.scaled_matmul, a, b, u, v, out, True)
    check(namespace.matmul_rows, e, b[:, :32].t().contiguous(), t, t.new_ones(16), out, True)
    check(namespace.matmul_weight_rows, a, u, weight, 64, d, out, True)
    for factors in (None, weight.new_ones(32)):
        check(namespace.matmul_weight_columns, e, t, weight, factors, dtype, out, True)
    for factors in (None, d):
        check(namespace.matmul_rounded, weight, factors, weight, factors, dtype, 64, out, True)
    tokens = rounded(32, 32, dtype, device)
    for sums, factors in ((False, None), (True, t.new_ones(32))):
        others = (dtype, 16, factors, out, sums, True)
        check(
            namespace.matmul_gradients, weight, d, weight.t()[:, :32], None, *tokens, t.new_ones(32), *others
        )
    check(namespace.matmul_rotated, a, b, u, v, False, 16, None, out, True)
    check(namespace.matmul_rotated, a, b.t().contiguous(), u, v, True, 16, None, out, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("with_factors", [False, True])
def test_steps_in_one_operator_have_the_bits_of_steps_one_by_one(device, dtype, with_factors):
    x, weight, e = (
        torch.randn(s, dtype=torch.bfloat16, device=device) for s in ((48, 64), (96, 64), (48, 96))
    )
    d, levels = (2.0 ** torch.randint(-3, 4, (n,), device=device) if with_factors else None for n in (64, 96))
    inverse = None if d is None else 1 / d
    out = torch.bfloat16
    y, data, scale, weight_scale = ops.matmul_rounded(x, inverse, weight, d, dtype, 64, out)
    one_by_one = ops.quantize_rows(x, dtype, 64, inverse)
    expected = (*ops.matmul_weight_rows(*one_by_one, weight, 64, d, out), *one_by_one)
    for mine, other in zip((y, weight_scale, data, scale), expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))

    divisors, ones = None if levels is None else 1 / levels, torch.ones(64, device=device)
    for sums, block in ((False, 1), (True, 64)):
        others = (dtype, block, d, out, sums)
        found = ops.matmul_gradients(e, levels, weight, divisors, data, scale, ones, *others)
        rows, row_scales, columns, column_scales, total = ops.quantize_grad(e, dtype, levels, scale, sums)
        dx = ops.matmul_weight_columns(rows, row_scales, weight, divisors, dtype, out)
        dw = ops.matmul_rotated(columns, data, column_scales, ones, True, block, d, out)
        for mine, other in zip(found, (dx, dw, total), strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.gpu
def test_float8_products_in_a_cuda_graph_have_the_same_bits():
    weight = torch.randn(128, 64, dtype=torch.bfloat16, device="cuda")
    a, u = rounded(48, 64, torch.float8_e4m3fn, "cuda")
    expected, _ = ops.matmul_weight_rows(a, u, weight, 64, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = ops.matmul_weight_rows(a, u, weight, 64, None, torch.bfloat16)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_operands_that_do_not_fit_are_refused():
    (a, u), (b, v) = rounded(16, 64, torch.int8, "cpu"), rounded(32, 48, torch.int8, "cpu")
    with pytest.raises(ValueError, match=r"contracted dimensions are equal; got \(16, 64\) and \(32, 48\)"):
        ops.scaled_matmul(a, b, u, v, torch.float32)
    with pytest.raises(ValueError, match="scale_b must have one value or one for each of 16 rows"):
        ops.scaled_matmul(a, a, u, v, torch.float32)
    with pytest.raises(ValueError, match="contracted dimensions"):
        ops.matmul_weight_columns(a, u, torch.randn(48, 16), None, torch.int8, torch.float32)
    with pytest.raises(ValueError, match="row_scale must be a real vector"):
        ops.matmul_weight_columns(a, u, torch.randn(64, 16), torch.ones(3), torch.int8, torch.float32)
    with pytest.raises(ValueError, match="block must be a power of two"):
        ops.matmul_weight_rows(a, u, torch.randn(48, 64), 48, None, torch.float32)
    with pytest.raises(ValueError, match="col_scale must be a real vector"):
        ops.matmul_rotated(a, a, u, u, False, 16, torch.ones(3), torch.float32)
    x, weight, wide = torch.randn(16, 64), torch.randn(48, 64), torch.randn(48, 32)
    with pytest.raises(ValueError, match=r"contracted dimensions are equal; got \(16, 64\) and \(48, 32\)"):
        ops.matmul_rounded(x, None, wide, None, torch.int8, 16, torch.float32)
    with pytest.raises(ValueError, match="col_scale must be a real vector"):
        ops.matmul_rounded(x, torch.ones(3), weight, None, torch.int8, 16, torch.float32)
    others = (torch.int8, 16, None, torch.float32, False)
    with pytest.raises(ValueError, match="contracted dimensions"):
        ops.matmul_gradients(x, None, weight, None, a, u, torch.ones(64), *others)
    with pytest.raises(ValueError, match=r"x must have shape \(16, 48\); got \(16, 64\)"):
        ops.matmul_gradients(x, None, weight.t(), None, a, u, torch.ones(48), *others)
    with pytest.raises(ValueError, match="weight_row_scale must be a real vector"):
        ops.matmul_gradients(x, None, weight.t(), torch.ones(3), a[:, :48], u, torch.ones(48), *others)
