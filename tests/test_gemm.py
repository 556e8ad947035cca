"""8-bit products on the CPU: exactness against integers and float64, scales, long contractions."""

from __future__ import annotations

import pytest
import torch

from halo_train import Quantized, quantize
from halo_train.gemm import matmul, matmul_rows


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "int8"])
@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_equals_the_product_of_the_dequantised_operands(fmt, scaling):
    a, b = (quantize(torch.randn(rows, 64), fmt, scaling=scaling) for rows in (48, 32))
    exact = a.dequantize().double() @ b.dequantize().double().t()
    torch.testing.assert_close(
        matmul(a, b, torch.float32).double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max()
    )


@pytest.mark.parametrize("fmt", ["e4m3", "int8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_contracting_rows_applies_one_scale_and_no_row_scales(fmt, compiled):
    product = torch.compile(matmul_rows, backend="aot_eager", fullgraph=True) if compiled else matmul_rows
    a, b = quantize(torch.randn(48, 32), fmt), quantize(torch.randn(32, 64), fmt)
    exact = a.dequantize().double() @ b.data.double()
    for scale, expected in ((b.scale, exact), (torch.tensor(0.5), 0.5 * exact)):
        found = product(a, Quantized(b.data, scale), torch.float32).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("m", [1, 3, 16, 17])
def test_int8_is_exact(m):
    a = torch.randint(-127, 128, (m, 4096), dtype=torch.int8)
    b = torch.randint(-127, 128, (24, 4096), dtype=torch.int8)
    product = matmul(Quantized(a, torch.ones(m)), Quantized(b, torch.ones(24)), torch.float64)
    assert torch.equal(product.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("k", [131072, 131072 * 2 + 48])
def test_int8_sums_do_not_overflow(k):
    a = torch.full((2, k), 127, dtype=torch.int8)
    product = matmul(Quantized(a, torch.ones(2)), Quantized(a, torch.ones(2)), torch.float64)
    assert (product == 127 * 127 * k).all()
