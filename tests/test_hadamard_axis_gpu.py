"""The CUDA kernels for an axis that is not the last, and random rotations on a GPU, against float64 rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hadamard_oracle import DTYPES, HALF, assert_rounded_once, expected, randn

from halo_train import hadamard_transform, ops, random_rotation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [2, 30, 64, 200])
@pytest.mark.parametrize("block", [2**k for k in range(1, 16)])
def test_matches_float64(block: int, inner: int, dtype: torch.dtype) -> None:
    outer, repeats = (3, 2) if block * inner < 1 << 18 else (1, 1)
    x = randn(outer, repeats * block, inner, dtype=dtype)
    signs = torch.randint(0, 2, (repeats * block,), device="cuda") * 2 - 1
    scale = 1 / math.sqrt(block)
    for s in (None, signs):
        y = ops.hadamard_axis(x, block, scale, s)
        exact = expected(x.mT.contiguous(), block, scale, s)
        assert_rounded_once(y.mT.contiguous(), exact, block)
        assert torch.equal(ops.hadamard_axis(x, block, scale, s), y)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(16384, 64), (3, 4096, 10), (2, 1024, 3), (5, 96, 16)])
def test_public_function(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Odd widths go by way of a transpose; both ways give the result rounded once."""
    x = randn(*shape, dtype=dtype)
    y = hadamard_transform(x, axis=-2)
    block = min(shape[-2] & -shape[-2], ops.MAX_BLOCK)
    assert_rounded_once(y.mT.contiguous(), expected(x.mT.contiguous(), block, 1 / math.sqrt(block)), block)
    offset = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(shape)
    assert torch.equal(hadamard_transform(offset, axis=-2), y)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 8, 0), (3, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert hadamard_transform(torch.empty(shape, device="cuda"), axis=1).shape == shape


def test_gradient_opcheck_graph() -> None:
    x = randn(2, 64, 6).requires_grad_()
    signs = torch.randint(0, 2, (64,), device="cuda") * 2 - 1
    grad = randn(2, 64, 6, seed=1)
    (dx,) = torch.autograd.grad(ops.hadamard_axis(x, 32, 0.25, signs), x, grad)
    torch.testing.assert_close(dx, ops.hadamard_axis(grad, 32, 0.25) * signs.to(grad.dtype)[:, None])
    torch.library.opcheck(torch.ops.halo_train.hadamard_axis.default, (x, 32, 0.5, signs))
    compiled = torch.compile(lambda t: hadamard_transform(t, axis=1), fullgraph=True)
    assert torch.equal(compiled(x), hadamard_transform(x, axis=1))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(("n", "block"), [(1024, None), (32768, None), (3072, 3072), (96, 32)])
def test_random_rotation(n: int, block: int | None, rounds: int) -> None:
    """The signs of the CPU; the inverse undoes it; the steps are rounded once each."""
    x = randn(33, n)
    y = random_rotation(x, 11, block=block, rounds=rounds)
    exact = random_rotation(x.double().cpu(), 11, block=block, rounds=rounds)
    error = (y.double().cpu() - exact).norm() / exact.norm()
    assert error < 2.0**-8 * math.sqrt(rounds / 3)
    back = random_rotation(y, 11, block=block, rounds=rounds, inverse=True)
    assert (back - x).double().norm() < 2.0**-8 * math.sqrt(2 * rounds / 3) * x.double().norm()
