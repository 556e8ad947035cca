"""random_rotation(): seeded signs, one or two rounds, their inverse."""

from __future__ import annotations

import hashlib
import math

import pytest
import scipy.linalg
import torch

from halo_train import ops, random_rotation
from halo_train.hadamard import random_signs


def test_signs_are_the_bits_of_shake_128():
    digest = hashlib.shake_128(b"halo_train signs 7 1").digest(2)
    expected = [1 - 2 * (digest[i // 8] >> i % 8 & 1) for i in range(13)]
    assert random_signs(13, 7, 1).tolist() == expected
    assert random_signs(0, 7).shape == (0,)
    assert random_signs(4096, 1).double().mean().abs() < 0.05
    assert not torch.equal(random_signs(64, 1), random_signs(64, 2))
    assert not torch.equal(random_signs(64, 1), random_signs(64, 1, 1))


@pytest.mark.parametrize(("n", "block"), [(64, None), (96, 32), (24, 12)])
def test_equals_the_product_of_matrices(n, block):
    x = torch.randn(5, n, dtype=torch.float64)
    y = random_rotation(x, 3, block=block)
    z = random_rotation(x, 3, block=block, rounds=2)
    if block != 12:
        b = block or n
        h = torch.from_numpy(scipy.linalg.hadamard(b) / b**0.5)

        def rotate(t, stream):
            signed = t * random_signs(n, 3, stream)
            return (signed.unflatten(1, (-1, b)) @ h).flatten(1)

        torch.testing.assert_close(y, rotate(x, 0))
        torch.testing.assert_close(z, rotate(rotate(x, 0), 1))
    for rounds, rotated in ((1, y), (2, z)):
        torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
        torch.testing.assert_close(random_rotation(rotated, 3, block=block, rounds=rounds, inverse=True), x)


def test_axis_and_gradient():
    x = torch.randn(3, 8, 2, dtype=torch.float64, requires_grad=True)
    for rounds in (1, 2):
        y = random_rotation(x, 5, axis=1, rounds=rounds)
        torch.testing.assert_close(y, random_rotation(x.mT, 5, rounds=rounds).mT)
        assert torch.autograd.gradcheck(lambda t, r=rounds: random_rotation(t, 5, axis=1, rounds=r), (x,))
        assert torch.autograd.gradcheck(
            lambda t, r=rounds: random_rotation(t, 5, axis=1, rounds=r, inverse=True), (x,)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_two_rounds_are_rounded_once(dtype):
    x = torch.randn(3, 256).to(dtype)
    exact = random_rotation(x.double(), 9, block=128, rounds=2)
    torch.testing.assert_close(
        random_rotation(x, 9, block=128, rounds=2), exact.to(dtype), rtol=0, atol=4 * torch.finfo(dtype).eps
    )
    back = random_rotation(exact, 9, block=128, rounds=2, inverse=True)
    torch.testing.assert_close(back, x.double())


def test_both_rounds_in_one_operator():
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    first, middle, last = (torch.randint(0, 256, (16,), dtype=torch.uint8) for _ in range(3))
    assert torch.autograd.gradcheck(lambda t: ops.hadamard_rounds(t, 64, 0.5, first, middle, last), (x,))
    assert torch.autograd.gradcheck(lambda t: ops.hadamard_rounds(t, 64, 0.5, None, middle), (x,))
    y = ops.hadamard_rounds(x, 64, 1 / 64, first, middle, last)
    torch.testing.assert_close(ops.hadamard_rounds(y, 64, 1 / 64, last, middle, first), x)
    z = x.detach().clone()
    ops.hadamard_rounds_(z, 64, 1 / 64, first, middle, last)
    assert torch.equal(z, y)
    torch.library.opcheck(torch.ops.halo_train.hadamard_rounds.default, (x, 64, 0.5, first, middle, None))
    with pytest.raises(ValueError, match="block must be at least 64"):
        ops.hadamard_rounds(x, 32, 0.5, first, middle)
    with pytest.raises(ValueError, match=r"middle must be uint8 of shape \(16,\)"):
        ops.hadamard_rounds(x, 64, 0.5, first, middle[:8])
    with pytest.raises(ValueError, match="must not require grad"):
        ops.hadamard_rounds_(x, 64, 0.5, None, middle)


@pytest.mark.parametrize(("n", "rounds"), [(48, 1), (128, 1), (128, 2)])
def test_compiles_more_than_once_in_a_graph(n, rounds):
    """Lengths that are constants of the graph: the signs depend on them."""

    def rotate(x):
        return random_rotation(random_rotation(x, 1, rounds=rounds), 2, rounds=rounds)

    x = torch.randn(3, n, requires_grad=True)
    compiled = torch.compile(rotate, fullgraph=True, dynamic=False, backend="aot_eager")
    y = rotate(x)
    assert torch.equal(compiled(x), y)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(dx, torch.autograd.grad(y.square().sum(), x)[0])


def test_two_rounds_make_a_one_hot_input_look_gaussian():
    """Kolmogorov distance to the normal law: 0.341 for any dimension after one round, of order 1/sqrt(n) after two."""
    n = 1024
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, 3] = math.sqrt(n)
    normal = torch.distributions.Normal(0.0, 1.0)

    def distance(rounds):
        values = torch.cat([random_rotation(x, seed, rounds=rounds)[0] for seed in range(40)]).sort().values
        cdf = normal.cdf(values.float()).double()
        grid = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
        return torch.maximum((cdf - grid[:-1]).abs(), (cdf - grid[1:]).abs()).max().item()

    assert abs(distance(1) - 0.341) < 0.02
    assert distance(2) < 0.04


def test_bad_input():
    with pytest.raises(ValueError, match="rounds must be 1 or 2; got 3"):
        random_rotation(torch.ones(2, 4), 0, rounds=3)
    with pytest.raises(IndexError, match=r"random_rotation: axis must be in \[-2, 1\]"):
        random_rotation(torch.ones(2, 4), 0, axis=2)
    with pytest.raises(ValueError, match=r"got torch.int64"):
        random_rotation(torch.ones(2, 4, dtype=torch.int64), 0)
