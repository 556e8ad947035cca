"""hadamard_transform() against scipy's matrix in float64: values, layouts, gradients, errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from halo_train import hadamard_transform, ops
from halo_train.hadamard import largest_block
from halo_train.hadamard_matrices import ORDERS, hadamard_matrix


def oracle(
    x: torch.Tensor, block: int, signs: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """Float64 product with scipy's Hadamard matrix along the last axis."""
    h = torch.from_numpy(scipy.linalg.hadamard(block)).double()
    y = x.double() if signs is None else x.double() * signs.double()
    # Scaled last: sums that cancel are zero, not what the roundings of a scaled matrix leave.
    return (y.unflatten(-1, (-1, block)) @ h).flatten(-2) * (block**-0.5 if scale is None else scale)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_dense_matrix_rounded_once(n, dtype):
    x = torch.randn(max(3, 4096 // n), n).to(dtype)  # enough elements for a share of 1e-3
    expected = oracle(x, n)
    y = hadamard_transform(x)
    assert y.dtype is dtype
    # One rounding of the exact value, plus float32 sums where outputs cancel.
    ulp = torch.finfo(dtype).eps * expected.abs()
    rms = expected.square().mean(1, keepdim=True).sqrt()
    assert ((y.double() - expected).abs() <= ulp + 1e-6 * rms).all()
    mismatches = (y != expected.to(dtype)).double().mean()
    assert mismatches < 1e-3 or dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("n", "block"), [(96, 32), (96, 8), (96, None), (7, None), (14336, None), (128, 1), (6, 2)]
)
def test_blocks_and_sizes_that_are_no_power_of_two(n, block):
    x = torch.randn(2, n, dtype=torch.float64)
    used = largest_block(n) if block is None else block
    torch.testing.assert_close(hadamard_transform(x, block=block), oracle(x, used), rtol=0, atol=1e-11)


def test_largest_block():
    assert [largest_block(n) for n in (0, 1, 7, 12, 14336, 65536, 3 * 65536)] == [
        1,
        1,
        1,
        4,
        2048,
        32768,
        32768,
    ]


@pytest.mark.parametrize(
    "block", [12, 40, 96, 3072, 5120, 28 * 8, 36, 44 * 2, 52, 60, 100, 108, 140, 156, 172 * 4]
)
def test_full_transforms_of_other_sizes(block):
    order = next(m for m in ORDERS if block % m == 0 and (block // m) & (block // m - 1) == 0)
    h = np.kron(hadamard_matrix(order).numpy(), scipy.linalg.hadamard(block // order)) / block**0.5
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    signs = torch.where(torch.rand(2 * block) < 0.5, -1.0, 1.0)
    expected = ((x * signs).unflatten(1, (2, block)) @ torch.from_numpy(h)).flatten(1)
    y = hadamard_transform(x, block=block, signs=signs)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(y, block=block, transpose=True) * signs, x)
    # One rounding: bf16 in and out, sums in between in float32.
    low = hadamard_transform(x.bfloat16(), block=block).double()
    exact = (x.bfloat16().double().unflatten(1, (2, block)) @ torch.from_numpy(h)).flatten(1)
    assert ((low - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_compiles_with_a_matrix_in_one_graph():
    x = torch.randn(2, 40)
    compiled = torch.compile(lambda t: hadamard_transform(t, block=40), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), hadamard_transform(x, block=40))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis(axis):
    x = torch.randn(4, 8, 16, dtype=torch.float64)
    expected = oracle(x.movedim(axis, -1), x.shape[axis]).movedim(-1, axis)
    torch.testing.assert_close(hadamard_transform(x, axis=axis), expected)


def test_signs_scale_and_inverse():
    x = torch.randn(5, 64, dtype=torch.float64)
    signs = torch.where(torch.rand(64) < 0.5, -1, 1).to(torch.int8)
    y = hadamard_transform(x, signs=signs)
    torch.testing.assert_close(y, oracle(x, 64, signs))
    torch.testing.assert_close(hadamard_transform(y) * signs, x)
    torch.testing.assert_close(hadamard_transform(x, scale=1.0), oracle(x, 64, scale=1.0))


def test_strided_offset_and_expanded_inputs():
    base = torch.randn(7, 40, dtype=torch.float64)
    for view in (base[:, 3:35], base[::2, :32], base.t()[:32].t(), base[0, :32].expand(3, 32), base[1, 5:37]):
        torch.testing.assert_close(hadamard_transform(view), oracle(view, 32))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_empty(shape):
    assert hadamard_transform(torch.empty(shape)).shape == shape


def test_input_is_not_changed():
    x = torch.randn(2, 16)
    before = x.clone()
    for kwargs in ({}, {"block": 1}, {"block": 1, "scale": 1.0}):
        y = hadamard_transform(x, **kwargs)
        y.zero_()
        assert torch.equal(x, before)


def test_factors_after_the_rotation_and_one_rounding():
    x, factors = torch.randn(5, 96).bfloat16(), torch.randn(96) * torch.logspace(-3, 3, 96)
    signs = torch.where(torch.rand(96) < 0.5, -1.0, 1.0)
    exact = oracle(x, 32, signs) * factors.double()
    y = ops.hadamard(x, 32, 32**-0.5, signs, factors)
    # Float32 arithmetic before the one rounding leaves next to no element that differs.
    assert (y != exact.bfloat16()).double().mean() < 1e-2
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=1e-5)
    ops.hadamard_(x, 32, 32**-0.5, signs, factors)
    assert torch.equal(x, y)


def test_gradcheck_with_factors():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    signs, factors = torch.tensor([1.0, -1, -1, 1] * 3), torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.hadamard(t, 4, 0.7, signs, factors), (x,))
    assert torch.autograd.gradgradcheck(lambda t: ops.hadamard(t, 4, 0.7, signs, factors), (x,))


@pytest.mark.parametrize("op", [ops.hadamard, ops.hadamard_])
def test_bad_factors(op):
    with pytest.raises(
        ValueError, match=r"out_scale must be a real vector of shape \(8,\).*got shape \(4,\)"
    ):
        op(torch.ones(2, 8), 8, 1.0, None, torch.ones(4))
    with pytest.raises(ValueError, match=r"out_scale must not require grad.*detach"):
        op(torch.ones(2, 8), 8, 1.0, None, torch.ones(8, requires_grad=True))


@pytest.mark.parametrize("signs", [None, "random"])
def test_gradcheck(signs):
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    s = None if signs is None else torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: hadamard_transform(t, axis=1, signs=s), (x,))
    assert torch.autograd.gradgradcheck(lambda t: hadamard_transform(t, axis=1, signs=s), (x,))


def test_gradcheck_of_a_matrix_that_is_not_symmetric():
    assert not torch.equal(hadamard_matrix(20), hadamard_matrix(20).t())
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(
            lambda t, transpose=transpose: hadamard_transform(t, block=20, transpose=transpose), (x,)
        )


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (
            torch.ones(8, dtype=torch.int32),
            {},
            "real floating-point dtype of at least 16 bits; got torch.int32",
        ),
        (torch.ones(8, dtype=torch.complex64), {}, "got torch.complex64"),
        (torch.ones(8).to(torch.float8_e4m3fn), {}, "got torch.float8_e4m3fn"),
        (torch.tensor(1.0), {}, "at least one dimension"),
        (
            torch.ones(2, 12),
            {"block": 8},
            "divides the axis of length 12; got 8; the largest for this axis is 4",
        ),
        (
            torch.ones(2, 12),
            {"block": 3},
            "power of two.*one of 12, 20, .*got 3; the largest power of two is 4",
        ),
        (torch.ones(2, 30), {"block": 12}, "divide the axis of length 30"),
        (torch.ones(2, 12), {"block": 0}, "power of two.*got 0"),
        (torch.ones(2, 65536), {"block": 65536}, "at most 32768"),
        (
            torch.ones(2, 8),
            {"signs": torch.ones(4)},
            r"signs must be a real vector of shape \(8,\).*got shape \(4,\)",
        ),
    ],
)
def test_bad_input(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        hadamard_transform(x, **kwargs)


def test_axis_out_of_range():
    with pytest.raises(IndexError, match=r"axis must be in \[-2, 1\].*got 2"):
        hadamard_transform(torch.ones(2, 2), axis=2)
