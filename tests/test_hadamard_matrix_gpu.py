"""The CUDA kernel for blocks of m 2^k against float64 rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hadamard_oracle import HALF, assert_rounded_once, expected, randn

from halo_train import hadamard_transform, ops
from halo_train.hadamard_matrices import ORDERS, hadamard_matrix

pytestmark = pytest.mark.gpu

SMALL_ORDERS = [m for m in ORDERS if m <= ops.MAX_ORDER]


def on_gpu(order: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return hadamard_matrix(order).to("cuda", dtype)


def signs_of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randint(0, 2, shape, device="cuda") * 2 - 1).to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("power", ops.MATRIX_POWERS)
@pytest.mark.parametrize("order", [4, 8, 16, 24, 48, 56, 64, *SMALL_ORDERS])
def test_matches_float64(order: int, power: int, dtype: torch.dtype) -> None:
    """Any +-1 matrix: here Hadamard ones and random ones."""
    if power == ops.MATRIX_POWERS[-1] and not 16 < order <= 32:
        return  # not served
    torch.manual_seed(order)
    random = signs_of(order, order, dtype=dtype)
    block = order * power
    for matrix in [random, on_gpu(order, dtype)] if order in SMALL_ORDERS else [random]:
        for rows in (1, 5, 67):
            x = randn(rows, 2 * block, dtype=dtype, seed=rows)
            exact = expected(x, block, 1 / math.sqrt(block), matrix=matrix)
            y = ops.hadamard(x, block, 1 / math.sqrt(block), matrix=matrix)
            assert_rounded_once(y, exact, block)
            assert torch.equal(ops.hadamard(x, block, 1 / math.sqrt(block), matrix=matrix), y)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("block", [3072, 5120, 14336, 28672, 12 * 1024, 24576, 60 * 128])
def test_layouts_signs_factors_in_place(block: int, dtype: torch.dtype) -> None:
    order = next(m for m in ORDERS if block % m == 0 and (block // m).bit_count() == 1)
    while block // order > (1024 if 16 < order <= 32 else 512):
        order *= 2
    matrix = signs_of(order, order, dtype=dtype)
    signs = signs_of(block, dtype=torch.int8)
    factors = randn(block, dtype=torch.float32, seed=1)
    base = randn(6, 5, block + 16, dtype=dtype)
    views = {
        "columns": base[0, :, :block],
        "columns of 3 axes": base[:, :, 8 : 8 + block],
        "unaligned": base[:, :, 3 : 3 + block],
        "every other row": base[:, ::2, :block],
        "reversed axes": base[:, :, :block].transpose(0, 1),
        "one row": base[0, 0, :block],
    }
    for name, x in views.items():
        for s, f in ((None, None), (signs, None), (signs, factors)):
            exact = expected(x.contiguous(), block, 0.01, s, matrix)
            y = ops.hadamard(x, block, 0.01, s, f, matrix)
            assert_rounded_once(y, exact, block, f)
            z = x.clone()
            ops.hadamard_(z, block, 0.01, s, f, matrix)
            assert torch.equal(z, y), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_public_function_and_its_gradient(dtype: torch.dtype) -> None:
    """hadamard_transform chooses the kernel; backward is the transpose, and the inverse undoes the rotation."""
    for block in (3072, 5120, 14336, 28672, 20 * 64, 12 * 2048):
        x = randn(9, block, dtype=dtype).requires_grad_()
        signs = torch.randint(0, 2, (block,), device="cuda") * 2 - 1
        y = hadamard_transform(x, block=block, signs=signs)
        exact = hadamard_transform(x.detach().double(), block=block, signs=signs)
        assert_rounded_once(y.detach(), exact, block)
        grad = randn(9, block, dtype=dtype, seed=1)
        (dx,) = torch.autograd.grad(y, x, grad)
        back = hadamard_transform(grad.double(), block=block, transpose=True) * signs
        assert_rounded_once(dx, back, block)


def test_infinities_stay_in_their_block() -> None:
    x = randn(8, 2 * 3072)
    y = hadamard_transform(x, block=3072)
    bad = x.clone()
    bad[5, 3072] = math.inf
    z = hadamard_transform(bad, block=3072)
    assert not torch.isfinite(z[5, 3072:]).any()
    z[5, 3072:] = y[5, 3072:]
    assert torch.equal(z, y)


@pytest.mark.parametrize(("block", "rows"), [(14336, 2300), (28672, 1150)])
def test_many_rows_with_signs(block: int, rows: int) -> None:
    """Many blocks with signs take another kernel than few: the same bits."""
    x = randn(rows, block)
    signs = signs_of(block, dtype=torch.int8)
    y = hadamard_transform(x, block=block, signs=signs)
    for few in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)):
        assert torch.equal(y[few], hadamard_transform(x[few], block=block, signs=signs))


def test_opcheck_and_graph() -> None:
    x, matrix = randn(5, 5120).requires_grad_(), on_gpu(20)
    torch.library.opcheck(torch.ops.halo_train.hadamard.default, (x, 5120, 0.5, None, None, matrix))
    compiled = torch.compile(lambda t: hadamard_transform(t, block=5120), fullgraph=True)
    assert torch.equal(compiled(x), hadamard_transform(x, block=5120))


def test_rejects_what_the_kernel_cannot_do() -> None:
    x = torch.zeros(2, 12 * 32, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="64 to 512 times the order"):
        ops.hadamard(x, 12 * 32, 1.0, matrix=on_gpu(12))
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        ops.hadamard(torch.zeros(2, 768, device="cuda"), 768, 1.0, matrix=on_gpu(12, torch.float32))
