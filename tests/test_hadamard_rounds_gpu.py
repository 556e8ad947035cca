"""The CUDA kernels for two rounds of signs and transform in one pass, against float64 rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hadamard_oracle import DTYPES, HALF, expected, randn
from hadamard_oracle import assert_rounded_once as assert_rounded
from torch import Tensor

from halo_train import ops, random_rotation
from halo_train.ops.reference import signs_of_bits

pytestmark = pytest.mark.gpu

SIZES = [2**k for k in range(6, 16)]


def assert_rounded_once(y: Tensor, exact: Tensor, block: int) -> None:
    """As for one round. What is less than 1e-3 in ``test_share_of_mismatches`` may be four standard deviations more here."""
    scatter = 4 * math.sqrt(1e-3 / max(y.numel(), 16000)) if y.dtype == torch.float16 else 0.0
    assert_rounded(y, exact, block, mismatches=1e-3 + scatter)


def bits_of(n: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 256, (n // 8,), generator=generator, device="cuda", dtype=torch.uint8)


def two_rounds(x: Tensor, block: int, scale: float, *bits: Tensor | None) -> Tensor:
    first, middle, last = (1.0 if b is None else signs_of_bits(b).double() for b in bits)
    y = expected(x.double() * first, block, 1.0)
    return expected(y * middle, block, scale) * last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_matches_float64(n: int, dtype: torch.dtype) -> None:
    """Rows of one and of three blocks, with and without the outer signs; the same bits every time and in place."""
    for blocks, rows in ((1, 5), (1, (1 << 19) // n + 3), (3, 37)):
        axis = blocks * n
        x = randn(rows, axis, dtype=dtype, seed=rows)
        first, middle, last = (bits_of(axis, seed) for seed in range(3))
        for signs in (
            (first, middle, None),
            (None, middle, last),
            (first, middle, last),
            (None, middle, None),
        ):
            y = ops.hadamard_rounds(x, n, 1 / n, *signs)
            assert_rounded_once(y, two_rounds(x, n, 1 / n, *signs), n)
            assert torch.equal(ops.hadamard_rounds(x, n, 1 / n, *signs), y)
            z = x.clone()
            ops.hadamard_rounds_(z, n, 1 / n, *signs)
            assert torch.equal(z, y)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_share_of_mismatches(n: int, dtype: torch.dtype) -> None:
    """Twice the additions of one round, and still fewer than 1e-3 of the elements differ from the rounded exact result."""
    first, middle = bits_of(n, 0), bits_of(n, 1)
    wrong, rows = 0, (1 << 22) // n
    for seed in range(4):
        x = randn(rows, n, dtype=dtype, seed=seed)
        exact = two_rounds(x, n, 1 / n, first, middle, None)
        wrong += int((ops.hadamard_rounds(x, n, 1 / n, first, middle) != exact.to(dtype)).sum())
    assert wrong < 1e-3 * 4 * rows * n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 512, 1024, 2048, 4096, 32768])
def test_a_row_does_not_depend_on_how_many_there_are(n: int, dtype: torch.dtype) -> None:
    first, middle = bits_of(n, 0), bits_of(n, 1)
    x = randn(300, n, dtype=dtype)
    y = ops.hadamard_rounds(x, n, 1 / n, first, middle)
    for rows in (*range(1, 20), 133, 265):
        assert torch.equal(ops.hadamard_rounds(x[:rows], n, 1 / n, first, middle), y[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 256, 1024, 8192])
def test_layouts(n: int, dtype: torch.dtype) -> None:
    base = randn(6, 5, n + 16, dtype=dtype)
    views = {
        "columns": base[0, :, :n],
        "columns of 3 axes": base[:, :, 8 : 8 + n],
        "unaligned": base[:, :, 3 : 3 + n],
        "every other row": base[:, ::2, :n],
        "reversed axes": base[:, :, :n].transpose(0, 1),
        "one row": base[0, 0, :n],
        "no rows": base[:0, 0, :n],
    }
    signs = (bits_of(n, 0), bits_of(n + 8, 1)[1:], bits_of(n, 2))
    for name, x in views.items():
        y = ops.hadamard_rounds(x, n, 1 / n, *signs)
        assert y.shape == x.shape
        if x.numel():
            assert_rounded_once(y, two_rounds(x.contiguous(), n, 1 / n, *signs), n)
        before = base.clone()
        z = before.as_strided(x.shape, x.stride(), x.storage_offset())
        ops.hadamard_rounds_(z, n, 1 / n, *signs)
        assert torch.equal(z, y), name
        # Nothing but the view has changed.
        z.copy_(x)
        assert torch.equal(before, base), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_rotation_inverse_and_gradient(n: int, dtype: torch.dtype) -> None:
    x = randn(7, n, dtype=dtype).requires_grad_()
    y = random_rotation(x, 3, rounds=2)
    cpu = random_rotation(x.detach().double().cpu(), 3, rounds=2).cuda()
    assert_rounded_once(y.detach(), cpu, n)
    grad = randn(7, n, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, x, grad)
    back = random_rotation(grad.double().cpu(), 3, rounds=2, inverse=True).cuda()
    assert_rounded_once(dx, back, n)
    assert torch.equal(dx, random_rotation(grad, 3, rounds=2, inverse=True))
    error = (random_rotation(y, 3, rounds=2, inverse=True) - x).norm() / x.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_magnitudes(n: int, dtype: torch.dtype) -> None:
    """Rows of any magnitude, beside each other: kernels that round sums to terms of 16 bits choose a power of two for each block."""
    first, middle = bits_of(n, 0), bits_of(n, 1)
    x = randn(8, n, dtype=dtype)
    y = ops.hadamard_rounds(x, n, 1 / n, first, middle)
    steps = range(-100, 101, 25) if dtype == torch.bfloat16 else range(-4, 9, 2)
    factors = torch.tensor([2.0**k for k in steps], device="cuda", dtype=torch.float32)
    scaled = (x[:, None].float() * factors[:, None]).to(dtype).flatten(0, 1)
    exact = two_rounds(scaled, n, 1 / n, first, middle, None)
    assert_rounded_once(ops.hadamard_rounds(scaled, n, 1 / n, first, middle), exact, n)
    if dtype == torch.bfloat16:  # float16 loses bits of small results
        z = (y[:, None].float() * factors[:, None]).to(dtype).flatten(0, 1)
        assert torch.equal(ops.hadamard_rounds(scaled, n, 1 / n, first, middle), z)

    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    rows = [
        torch.zeros(n, device="cuda", dtype=torch.float64),
        x[0].double().sign() * least,  # subnormal
        x[1].double() * info.smallest_normal,
        signs_of_bits(first).double()
        * (60000.0 if dtype == torch.float16 else 2.0**100),  # adds up in one place
        torch.zeros(n, device="cuda", dtype=torch.float64).index_fill_(
            0, torch.tensor([n - 1], device="cuda"), 60000.0
        ),
        x[2].double().index_fill(0, torch.tensor([n // 2], device="cuda"), 50000.0),  # one outlier
    ]
    odd = torch.stack(rows).to(dtype)
    exact = two_rounds(odd, n, 1 / n, first, middle, None)
    assert_rounded_once(ops.hadamard_rounds(odd, n, 1 / n, first, middle), exact, n)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("n", "high"),
    [
        (1024, (8, 9)),
        (2048, (8, 9, 10)),
        (4096, (8, 9, 10)),
        (8192, (8, 11, 12)),
        (16384, (11, 12, 13)),
        (32768, (8, 12, 13, 14)),
    ],
)
def test_sums_stay_in_range(n: int, high: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows of +-1 and signs between made so that what the second round has added up after the product of bits 0, 1, 3 and 4
    and the additions of the high ones is larger than any sum of the first."""
    index = torch.arange(n, device="cuda")
    bit = [index >> k & 1 for k in range(15)]
    x = (1.0 - 2 * (bit[0] & bit[1] ^ bit[3] & bit[4])).double()
    if len(high) % 2:
        every = bit[high[0]].clone()
        for k in high[1:]:
            every &= bit[k]
        x *= 1 - 2 * every
    else:
        for k, m in zip(high[::2], high[1::2], strict=True):
            x *= 1 - 2 * (bit[k] & bit[m])
    negative = expected(x[None], n, 1.0)[0] < 0
    middle = (negative.view(-1, 8).int() << torch.arange(8, device="cuda")).sum(dim=1).to(torch.uint8)
    largest = {torch.bfloat16: 255 / 128, torch.float16: 2047 / 1024}[dtype]
    rows = torch.stack((x, -x)).to(dtype) * largest
    exact = two_rounds(rows, n, 1 / n, None, middle, None)
    assert_rounded_once(ops.hadamard_rounds(rows, n, 1 / n, None, middle), exact, n)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", [n for n in SIZES if n <= 8192])
def test_small_integers_are_exact(n: int, dtype: torch.dtype) -> None:
    """Sums that fit 22 bits, of which many lie halfway between two results."""
    first, middle = bits_of(n, 0), bits_of(n, 1)
    x = randn(500, n, dtype=dtype).round()
    exact = two_rounds(x, n, 1 / n, first, middle, None)
    assert torch.equal(ops.hadamard_rounds(x, n, 1 / n, first, middle), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_infinities_stay_in_their_block(dtype: torch.dtype) -> None:
    for n in SIZES:
        middle = bits_of(4 * n, 0)
        x = randn(5, 4 * n, dtype=dtype)
        y = ops.hadamard_rounds(x, n, 1 / n, None, middle)
        x[3, 2 * n + 5] = math.inf
        z = ops.hadamard_rounds(x, n, 1 / n, None, middle)
        assert not torch.isfinite(z[3, 2 * n : 3 * n]).any()
        z[3, 2 * n : 3 * n] = y[3, 2 * n : 3 * n]
        assert torch.equal(z, y)


def test_opcheck_and_graph() -> None:
    x = randn(5, 1024).requires_grad_()
    torch.library.opcheck(
        torch.ops.halo_train.hadamard_rounds.default, (x, 1024, 0.5, bits_of(1024, 0), bits_of(1024, 1), None)
    )
    compiled = torch.compile(lambda t: random_rotation(t, 1, rounds=2), fullgraph=True)
    assert torch.equal(compiled(x), random_rotation(x, 1, rounds=2))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        y = random_rotation(x.detach(), 1, rounds=2)
    graph.replay()
    assert torch.equal(y, random_rotation(x.detach(), 1, rounds=2))


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    x = torch.empty(1 << 21, 1024 + 512, device="cuda", dtype=torch.bfloat16).normal_()
    middle = bits_of(1536, 0)
    y = ops.hadamard_rounds(x, 512, 1 / 512, None, middle)
    for rows in (slice(0, 5), slice(-5, None)):
        assert torch.equal(y[rows], ops.hadamard_rounds(x[rows], 512, 1 / 512, None, middle))
