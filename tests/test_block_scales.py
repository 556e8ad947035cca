"""Gradients rounded with scales for blocks, on the CPU: the reference of the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from block_oracle import assert_rounds_blocks, values_of

from halo_train import ops
from halo_train.ops.fused_reference import ACTIVATIONS, gated_gradients
from halo_train.ops.reference import SCALE_BLOCK

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (48, 32), (3, SCALE_BLOCK), (SCALE_BLOCK + 1, 24), (40, 2 * SCALE_BLOCK - 8), (600, 700)]


def example(m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    e = (torch.randn(m, n) * torch.exp2(torch.randint(-30, 20, (m, 1)).float())).to(dtype)
    if m > 3:
        e[1] = 0
    return e, torch.rand(n) + 0.1, torch.rand(m) + 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradient(m, n, fold, dtype):
    e, t, s = example(m, n, dtype)
    e = torch.where(e.isfinite(), e, 1.0)
    a, u, b, v, sums = ops.quantize_grad_blocks(e, E4M3, t if fold else None, s, column_sums=True)
    exact = e.double()
    assert_rounds_blocks(a, u, exact * t.double() if fold else exact)
    assert_rounds_blocks(b, v, (exact * s.double()[:, None]).t())
    torch.testing.assert_close(sums.double(), exact.sum(0), rtol=0, atol=1e-5 * float(exact.abs().max()))
    assert ops.quantize_grad_blocks(e, E4M3, None, s)[4].shape == (0,)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_gradient(activation, scaled):
    dh, gate, up = ((2 * torch.randn(300, 520)).bfloat16() for _ in range(3))
    s, t, r = torch.rand(300) + 0.1, torch.rand(520) + 0.1, torch.rand(520) + 0.1
    columns = (t, r) if scaled else (None, None)
    results = ops.gated_grad_blocks(dh, gate, up, activation, E4M3, s, *columns)
    dgate, dup = gated_gradients(dh.double(), gate.double(), up.double(), activation)
    t, r = (t.double(), r.double()) if scaled else (1, 1)
    exact = (dgate * t, dup * r, (dgate * s.double()[:, None]).t(), (dup * s.double()[:, None]).t())
    for q, scale, y in zip(results[::2], results[1::2], exact, strict=True):
        assert_rounds_blocks(q, scale, y)


def test_scales_are_the_smallest_powers_that_hold_a_block():
    sizes = torch.tensor([448.0, 449.0, 450.0, 447.0, 1.75, 1.7578125, 1.0, 0.0, -448.0])
    a, u, _, _, _ = ops.quantize_grad_blocks(sizes[:, None], E4M3, None, torch.ones(9))
    # bfloat16 has no 449, between 448 and 450: the even one is 448.
    assert u[0].tolist() == [1, 1, 16, 1, 2**-8, 2**-4, 2**-8, 1, 1]
    assert a.flatten().float().tolist() == [448, 448, 28, 448, 448, 28, 256, 0, -448]


def test_tiny_blocks_lose_their_codes_before_their_scales_end():
    sizes = torch.tensor([448 * 2.0**-60, 2.0**-60, 2.0**-69, 2.0**-100, 3e38])
    a, u, b, v, _ = ops.quantize_grad_blocks(sizes[:, None], E4M3, None, torch.ones(5))
    assert u[0].tolist() == [2.0**-60] * 4 + [2.0**120]
    assert values_of(a, u).flatten().tolist()[:4] == [448 * 2.0**-60, 2.0**-60, 2.0**-69, 0]
    assert v.tolist() == [[2.0**120]]
    assert b.float().tolist() == [[0, 0, 0, 0, a[4].item()]]


def assert_rounds_tiles(data: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor, base: int) -> None:
    """As assert_rounds_blocks, of rows of exact^T, with the scale of a tile, base times a power of 16, for each of its rows."""
    n, k = exact.shape
    assert scale.shape == (-(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK))
    of_rows = scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, :k].contiguous()
    steps = of_rows.double().t().repeat_interleave(SCALE_BLOCK, dim=1)[:, :n]
    error = (values_of(data, of_rows) - exact.t()).abs()
    assert (error <= (2**-4 + 2**-8) * exact.t().abs() + 2**-10 * 1.01 * steps).all()
    for block, tile in torch.cartesian_prod(*(torch.arange(s) for s in scale.shape)).reshape(-1, 2).tolist():
        rows = slice(SCALE_BLOCK * block, SCALE_BLOCK * (block + 1))
        amax = exact[rows, SCALE_BLOCK * tile : SCALE_BLOCK * (tile + 1)].abs().max().item()
        found = scale[block, tile].item()
        exponent = math.log2(found / base)
        assert exponent % 4 == 0
        if amax == 0:
            assert found == base
        else:
            assert amax <= 448 * found * 1.01
            assert exponent == -60 or amax >= 448 * found * 0.99 / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_tiles(n, k, scaled, dtype):
    w, t, s = example(n, k, dtype)
    w = torch.where(w.isfinite(), w, 1.0)
    if n > 300:
        w[256:512, :256] = 0
    r = torch.rand(n) + 0.1
    for of_rows, of_columns in ((None, None), (None, t), (r, None), (r, t)):
        data, scale = ops.quantize_tiles(w, E4M3, s if scaled else None, of_rows, of_columns)
        assert (data.dtype, data.shape, scale.dtype) == (E4M3, (k, n), torch.float32)
        assert data.is_contiguous()
        exact = w.double() / s.double()[:, None] if scaled else w.double()
        exact = exact if of_rows is None else exact * r.double()[:, None]
        exact = exact if of_columns is None else exact * t.double()
        assert_rounds_tiles(data, scale, exact, 8 if scaled else 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_are_seen_in_their_own_tiles(bad):
    w = torch.randn(SCALE_BLOCK + 16, 2 * SCALE_BLOCK)
    w[SCALE_BLOCK + 3, 5] = bad
    assert ops.quantize_tiles(w, E4M3)[1].isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_seen_in_their_own_blocks(bad):
    e = torch.randn(SCALE_BLOCK + 16, 2 * SCALE_BLOCK)
    e[SCALE_BLOCK + 3, 5] = bad
    a, u, b, v, _ = ops.quantize_grad_blocks(e, E4M3, torch.ones(e.shape[1]), torch.ones(e.shape[0]))
    assert u.isnan().nonzero().tolist() == [[0, SCALE_BLOCK + 3]]
    assert v.isnan().nonzero().tolist() == [[1, 5]]
    for q, scale in ((a, u), (b, v)):
        assert values_of(q, scale).isnan().sum() == (SCALE_BLOCK if q is a else 16)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
def test_empty(shape):
    e, t, s = torch.empty(shape), torch.ones(shape[1]), torch.ones(shape[0])
    a, u, b, v, sums = ops.quantize_grad_blocks(e, E4M3, t, s, column_sums=True)
    assert (a.shape, b.shape, sums.tolist()) == (shape, shape[::-1], [0.0] * shape[1])
    assert u.shape == (-(-shape[1] // SCALE_BLOCK), shape[0])
    assert v.shape == (-(-shape[0] // SCALE_BLOCK), shape[1])
    forms = ops.gated_grad_blocks(e, e, e, "silu", E4M3, s)
    assert [f.shape for f in forms[1::2]] == [u.shape, u.shape, v.shape, v.shape]
    data, scale = ops.quantize_tiles(e, E4M3, s)
    assert (data.shape, scale.shape) == (shape[::-1], tuple(-(-n // SCALE_BLOCK) for n in shape))


X, W = torch.ones(2, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.quantize_grad_blocks(X, torch.int8, None, W[:2]),
            "float8_e4m3fn.*torch.int8.*scale a row",
        ),
        (lambda: ops.quantize_tiles(X, torch.int8), "float8_e4m3fn.*torch.int8.*scale a row"),
        (lambda: ops.quantize_tiles(X, E4M3, W), r"divisor .*\(2,\).*\(6,\)"),
        (lambda: ops.quantize_tiles(X, E4M3, None, W), r"row_scale .*\(2,\).*\(6,\)"),
        (lambda: ops.quantize_tiles(X, E4M3, col_scale=W[:2]), r"col_scale .*\(6,\).*\(2,\)"),
        (lambda: ops.quantize_grad_blocks(X, E4M3, None, W), r"row_scale .*\(2,\).*\(6,\)"),
        (lambda: ops.quantize_grad_blocks(X, E4M3, W[:2], W[:2]), r"col_scale .*\(6,\).*\(2,\)"),
        (lambda: ops.gated_grad_blocks(X, X, X, "silu", torch.float8_e5m2, W[:2]), "float8_e4m3fn.*e5m2"),
        (lambda: ops.gated_grad_blocks(X, X[:1], X, "silu", E4M3, W[:2]), r"gate must have shape"),
        (lambda: ops.gated_grad_blocks(X, X, X, "silu", E4M3, W[:2], None, W[:2]), r"up_col_scale .*\(6,\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("sums", [False, True])
def test_opcheck(sums):
    e, t, s = example(40, 300, torch.bfloat16)
    torch.library.opcheck(torch.ops.halo_train.quantize_grad_blocks, (e, E4M3, t, s, sums))
    torch.library.opcheck(torch.ops.halo_train.gated_grad_blocks, (e, e, e, "gelu", E4M3, s, t, None))
    factors = (s, s, t) if sums else (None, None, None)
    torch.library.opcheck(torch.ops.halo_train.quantize_tiles, (e, E4M3, *factors))
