"""Rounding to 8 bits: values against an independent float64 computation, edge cases of the scales, equalisation."""

from __future__ import annotations

import pytest
import torch

from halo_train import hadamard_transform, ops, quantize
from halo_train.quantize import equalizer_exponents, quantize_grad, quantize_transposed

QMAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
MANTISSA_BITS = {"e4m3": 3, "e5m2": 2}
MIN_EXPONENT = {"e4m3": -6, "e5m2": -14}


def nearest(values: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round half to even onto the grid of the format, in float64."""
    if fmt == "int8":
        return values.round().clamp(-127, 127)
    exponent = torch.floor(torch.log2(values.abs())).clamp(min=MIN_EXPONENT[fmt])
    step = torch.exp2(exponent - MANTISSA_BITS[fmt])
    return ((values / step).round() * step).clamp(-QMAX[fmt], QMAX[fmt])


@pytest.mark.parametrize("fmt", QMAX)
@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_scales(fmt, scaling, dtype):
    x = (torch.randn(33, 48) * torch.exp(torch.randn(33, 1))).to(dtype)
    q = quantize(x, fmt, scaling=scaling)
    amax = x.double().abs().amax(dim=1) if scaling == "rowwise" else x.double().abs().amax()
    torch.testing.assert_close(q.scale.double(), amax / QMAX[fmt], rtol=1e-6, atol=0)
    values = x.double() * (QMAX[fmt] / (amax[:, None] if scaling == "rowwise" else amax))
    # The nearest grid point, or the other side of what is a tie up to float32 rounding.
    error, least = (q.data.double() - values).abs(), (nearest(values, fmt) - values).abs()
    assert (error <= least + 1e-6 * values.abs()).all()
    assert q.data.double().abs().amax() == QMAX[fmt]


def test_rotation_and_column_factors_come_before_the_rounding():
    x, d = torch.randn(5, 64), torch.exp2(torch.randint(-3, 4, (64,)).float())
    q = quantize(x, "e4m3", block=16, col_scale=d)
    expected = quantize(hadamard_transform(x.double() * d.double(), block=16).float(), "e4m3")
    assert (q.data.float() != expected.data.float()).float().mean() < 2e-3
    torch.testing.assert_close(q.scale, expected.scale, rtol=1e-6, atol=0)


def test_transposed_with_folded_row_scales():
    e, s = torch.randn(40, 24), torch.rand(40) + 0.1
    q = quantize_transposed(e, "int8", s)
    expected = quantize((e * s[:, None]).t().contiguous(), "int8")
    assert q.data.shape == (24, 40)
    assert q.data.is_contiguous()
    assert torch.equal(q.data, expected.data)
    assert torch.equal(q.scale, expected.scale)
    for ours, ones in zip(
        quantize_transposed(e, "int8"), quantize_transposed(e, "int8", torch.ones(40)), strict=True
    ):
        assert torch.equal(ours, ones)


@pytest.mark.parametrize("fold", [True, False])
def test_both_forms_of_a_gradient(fold):
    e, t, s = torch.randn(40, 24), torch.rand(24) + 0.1 if fold else None, torch.rand(40) + 0.1
    a, b, sums = quantize_grad(e, "e4m3", t, s)
    assert sums is None
    for ours, alone in ((a, quantize(e, "e4m3", col_scale=t)), (b, quantize_transposed(e, "e4m3", s))):
        assert torch.equal(ours.data.float(), alone.data.float())
        assert torch.equal(ours.scale, alone.scale)


def test_column_sums_of_a_gradient():
    e, t, s = torch.randn(40, 24).bfloat16(), torch.rand(24) + 0.1, torch.rand(40) + 0.1
    *forms, sums = ops.quantize_grad(e, torch.int8, t, s, column_sums=True)
    for ours, alone in zip(forms, ops.quantize_grad(e, torch.int8, t, s)[:4], strict=True):
        assert torch.equal(ours, alone)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), e.double().sum(0), rtol=0, atol=1e-5)


def test_transposed_data():
    q = quantize(torch.randn(5, 7), "int8")
    assert torch.equal(q.transposed_data(), q.data.t())
    assert q.transposed_data().is_contiguous()
    with pytest.raises(ValueError, match=r"one-byte elements; got shape \(2, 2\), torch.float32"):
        ops.transpose_bytes(torch.ones(2, 2))


def test_leading_shapes_and_dequantize():
    x = torch.randn(2, 3, 5, 32)
    q = quantize(x, "int8")
    assert q.scale.shape == (2, 3, 5)
    assert (q.dequantize() - x).abs().max() <= 0.5 * q.scale.max() * 1.0001


@pytest.mark.parametrize("fmt", QMAX)
@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_zero_rows_have_scale_one_and_stay_zero(fmt, scaling):
    q = quantize(torch.zeros(3, 16), fmt, scaling=scaling)
    assert (q.scale == 1).all()
    assert (q.data.float() == 0).all()


@pytest.mark.parametrize("fmt", QMAX)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_poison_their_own_row_only(fmt, bad):
    x = torch.randn(4, 16)
    x[2, 5] = bad
    values = quantize(x, fmt).dequantize()
    assert not torch.isfinite(values[2]).any()
    assert torch.isfinite(values[[0, 1, 3]]).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 3e38])
def test_extreme_magnitudes_stay_finite(size):
    x = torch.full((2, 16), size)
    values = quantize(x, "e4m3").dequantize()
    assert torch.isfinite(values).all()
    assert (values - x).abs().max() <= max(2.0**-4 * size, 2.0**-100)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_empty(shape):
    for scaling in ("rowwise", "tensorwise"):
        assert quantize(torch.empty(shape), "e4m3", scaling=scaling).data.shape == shape
    assert quantize_transposed(torch.empty(shape), "e4m3", torch.ones(shape[0])).data.shape == shape[::-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize(torch.ones(2, 4, dtype=torch.int64), "e4m3"),
            "real floating-point dtype of at least 16 bits; got torch.int64",
        ),
        (lambda: quantize(torch.ones(2, 4), "fp8"), "fmt must be one of e4m3, .*got 'fp8'"),
        (lambda: quantize(torch.ones(2, 4), "e4m3", col_scale=torch.ones(3)), r"col_scale .*\(4,\).*\(3,\)"),
        (lambda: quantize(torch.ones(2, 6), "e4m3", block=4), "divides the axis of length 6; got 4"),
        (lambda: quantize_transposed(torch.ones(2, 6), "e4m3", torch.ones(6)), r"row_scale .*\(2,\).*\(6,\)"),
        (lambda: quantize_transposed(torch.ones(6), "e4m3", torch.ones(6)), r"matrix \[rows, columns\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equalizer_follows_its_equation():
    x, w = torch.randn(64, 32) * torch.exp(2 * torch.randn(32)), torch.randn(48, 32)
    exponent = equalizer_exponents(x, w).double()
    raw = torch.round(0.5 * torch.log2(x.abs().amax(0).double() / w.abs().amax(0).double()))
    assert raw.unique().numel() > 2
    assert torch.equal(exponent, raw - raw.median())


def test_equalizer_of_known_channels():
    x, w = torch.ones(4, 5), torch.ones(3, 5)
    x[:, 3] *= 64
    w[:, 1] /= 16
    assert equalizer_exponents(x, w).tolist() == [0, 2, 0, 3, 0]


def test_equalizer_ignores_dead_and_nonfinite_channels():
    x, w = torch.randn(8, 6), torch.randn(4, 6)
    x[:, 0], w[:, 1], x[2, 2], w[1, 3] = 0.0, 0.0, float("inf"), float("nan")
    assert (equalizer_exponents(x, w)[:4] == 0).all()
    assert (equalizer_exponents(torch.zeros(8, 6), w) == 0).all()
