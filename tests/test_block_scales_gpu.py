"""The kernels that round gradients with scales for blocks, against the reference on the CPU: equal bit by bit where the arithmetic is
the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_oracle import assert_rounds_blocks
from quantize_oracle import bits
from test_block_scales import E4M3, example

from halo_train import ops
from halo_train.ops import block_reference
from halo_train.ops.fused_reference import ACTIVATIONS, gated_gradients
from halo_train.ops.reference import SCALE_BLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="needs clusters of Hopper",
    ),
]

# Vectors in whole and partial tiles and clusters, and what is taken an element at a time.
SHAPES = [(16, 16), (16, 4096), (1040, 264), (272, 400), (512, 1024), (2064, 8), (4096, 1040), (144, 28672)]
SHAPES += [(1, 1), (3, 7), (33, 48), (100, 264), (257, 1000), (513, 136), (48, 1001), (1, 9000), (9000, 1)]


def assert_same(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Codes equal as numbers, as zeros have two signs, and scales and sums as bits but for what a NaN holds."""
    for mine, true in zip(ours, expected, strict=True):
        assert (mine.shape, mine.dtype) == (true.shape, true.dtype)
        assert mine.is_contiguous()
        torch.testing.assert_close(mine.cpu().float(), true.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradient(m, n, dtype):
    e, t, s = example(m, n, dtype)
    for factors in (None, t):
        expected = block_reference.quantize_grad_blocks(e, E4M3, factors, s)
        ge, gt, gs = e.cuda(), None if factors is None else t.cuda(), s.cuda()
        assert_same(ops.quantize_grad_blocks(ge, E4M3, gt, gs), expected)
        *forms, sums = ops.quantize_grad_blocks(ge, E4M3, gt, gs, column_sums=True)
        assert_same(tuple(forms), expected[:4])
        exact, size = e.double().sum(0), e.double().abs().sum(0)
        finite = size.isfinite()
        assert ((sums.cpu().double() - exact).abs() <= 1e-6 * size)[finite].all()
        assert torch.equal(bits(sums), bits(ops.quantize_grad_blocks(ge, E4M3, gt, gs, column_sums=True)[4]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_tiles(n, k, dtype):
    w, t, s = example(n, k, dtype)
    r = torch.rand(n) + 0.1
    for factors in itertools.product((None, s), (None, r), (None, t)):
        expected = block_reference.quantize_tiles(w, E4M3, *factors)
        given = [None if v is None else v.cuda() for v in factors]
        assert_same(ops.quantize_tiles(w.cuda(), E4M3, *given), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1024, 1025])
def test_extreme_weights(dtype, width):
    w = torch.randn(768, width, dtype=dtype)
    tiles = torch.exp2(torch.randint(-140, 127, (3, width // SCALE_BLOCK + 1)).float())
    w *= tiles.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)[:, :width].to(dtype)
    w[100:600, 512:768] = 0  # a whole tile, and parts
    w[5, 6], w[300, 300], w[600, 900], w[767, width - 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    for size in (None, 1.0, 1e-30, 1e30):
        s = None if size is None else size * (torch.rand(768) + 0.1)
        expected = block_reference.quantize_tiles(w, E4M3, s)
        assert_same(ops.quantize_tiles(w.cuda(), E4M3, None if s is None else s.cuda()), expected)
        for block, tile in ((0, 0), (1, 1), (2, 3), (2, (width - 1) // SCALE_BLOCK)):
            assert expected[1][block, tile].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [-3e4, 3e4])
def test_the_largest_weight_may_be_anywhere(dtype, value):
    for row, column in ((0, 0), (0, 1), (24, 9), (131, 255), (255, 130), (300, 16)):
        w = torch.ones(304, 272, dtype=dtype, device="cuda")
        w[row, column] = value
        data, scale = ops.quantize_tiles(w, E4M3)
        expected = torch.full((2, 2), 2.0**-8)
        expected[row // SCALE_BLOCK, column // SCALE_BLOCK] = 2.0**8
        assert torch.equal(scale.cpu(), expected)
        assert abs(data[column, row].item() * 2**8 - value) <= abs(value) / 16


def test_views_with_gaps_and_odd_addresses():
    x = torch.randn(640, 1200).bfloat16()
    for view in (
        x[:, 3:515],
        x[::2, :528],
        x[5:, 8:264],
        x[:, :1000],
        x.t()[:528, :48],
        x[:, :7],
        x[16:32, 16:32],
    ):
        s, t = torch.rand(view.shape[0] + 1)[1:] + 0.1, torch.rand(view.shape[1] + 1)[1:] + 0.1
        ours = x.cuda().as_strided(view.shape, view.stride(), view.storage_offset())
        gs = torch.cat([s[:1], s]).cuda()[1:]
        assert_same(
            ops.quantize_grad_blocks(ours, E4M3, t.cuda(), gs),
            block_reference.quantize_grad_blocks(view, E4M3, t, s),
        )
        assert_same(
            ops.quantize_tiles(ours, E4M3, gs, gs, t.cuda()),
            block_reference.quantize_tiles(view, E4M3, s, s, t),
        )


@pytest.mark.parametrize("width", [1024, 1025])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_values(dtype, width):
    e = torch.randn(768, width, dtype=dtype)
    e *= torch.exp2(torch.randint(-140, 127, (768, 1)).float()).to(dtype)
    e[::7] = 0
    e[::11] = -0.0
    e[100:356, 512:768] = 0  # of rows whole blocks, of columns parts
    e[5, 6], e[300, 700], e[301, 701], e[767, width - 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    for size in (1.0, 1e-30, 1e30):
        s, t = size * (torch.rand(768) + 0.1), (torch.rand(width) + 0.1) / size
        for factors in (None, t):
            expected = block_reference.quantize_grad_blocks(e, E4M3, factors, s)
            ours = ops.quantize_grad_blocks(e.cuda(), E4M3, None if factors is None else t.cuda(), s.cuda())
            assert_same(ours, expected)
            rows, columns = expected[1].isnan(), expected[3].isnan()
            assert rows[0, 5]
            assert rows[700 // SCALE_BLOCK, 300]
            assert columns[0, 6]
            assert columns[767 // SCALE_BLOCK, width - 1]


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(shape):
    e, s = torch.empty(shape), torch.ones(shape[0])
    expected = block_reference.quantize_grad_blocks(e, E4M3, None, s, True)
    assert_same(ops.quantize_grad_blocks(e.cuda(), E4M3, None, s.cuda(), True), expected)
    assert_same(ops.quantize_tiles(e.cuda(), E4M3), block_reference.quantize_tiles(e, E4M3))
    forms = ops.gated_grad_blocks(e.cuda(), e.cuda(), e.cuda(), "silu", E4M3, s.cuda())
    assert_same(forms, block_reference.gated_grad_blocks(e, e, e, "silu", E4M3, s))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "f"), [(1, 1), (33, 48), (64, 256), (528, 1064), (257, 1000), (48, 14336)])
def test_gated_gradient(m, f, activation, dtype):
    # 1 + erf cancels where gelu ends, at 1e-8 of the largest gradient: all that a block of one row may hold.
    size = 1 if activation == "gelu" else 2
    x = [(size * torch.randn(m, f, device="cuda")).to(dtype) for _ in range(3)]
    s, t, r = (torch.rand(n, device="cuda") + 0.1 for n in (m, f, f))
    dgate, dup = gated_gradients(*(v.double() for v in x), activation)
    for columns in ((None, None), (t, r)):
        results = ops.gated_grad_blocks(*x, activation, E4M3, s, *columns)
        scaled = [g if c is None else g * c.double() for g, c in zip((dgate, dup), columns, strict=True)]
        exact = (*scaled, (dgate * s.double()[:, None]).t(), (dup * s.double()[:, None]).t())
        for q, scale, y in zip(results[::2], results[1::2], exact, strict=True):
            assert_rounds_blocks(q.cpu(), scale.cpu(), y.cpu())


def test_nonfinite_values_of_a_gated_gradient():
    dh, gate, up = (torch.randn(512, 768, device="cuda").bfloat16() for _ in range(3))
    dh[3, 300] = torch.nan
    s = torch.ones(512, device="cuda")
    forms = ops.gated_grad_blocks(dh, gate, up, "silu", E4M3, s)
    for scale, at in zip(forms[1::2], ([300 // SCALE_BLOCK, 3],) * 2 + ([0, 300],) * 2, strict=True):
        assert scale.isnan().nonzero().tolist() == [at]


def test_repeatable_and_graph_safe():
    e, t, s = (v.cuda() for v in example(1024, 4096, torch.bfloat16))
    expected = ops.quantize_grad_blocks(e, E4M3, t, s, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_grad_blocks(e, E4M3, t, s, True)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, expected, strict=True))


def test_opcheck():
    e, t, s = (v.cuda() for v in example(48, 320, torch.bfloat16))
    for sums in (False, True):
        torch.library.opcheck(torch.ops.halo_train.quantize_grad_blocks, (e, E4M3, t, s, sums))
    torch.library.opcheck(torch.ops.halo_train.gated_grad_blocks, (e, e, e, "gelu", E4M3, s, t, None))
    torch.library.opcheck(torch.ops.halo_train.quantize_tiles, (e, E4M3, s, s, t))


def test_more_rows_than_an_axis_of_the_grid_holds():
    blocks = 65535 // 2 + 2
    e = torch.ones(blocks * SCALE_BLOCK, 16, dtype=torch.bfloat16, device="cuda")
    e[-1, -1] = 3.0
    forms = ops.quantize_grad_blocks(e, E4M3, None, torch.ones(e.shape[0], device="cuda"))
    guard = torch.zeros(1 << 22, device="cuda")  # behind the scales, more likely than not
    again = ops.quantize_grad_blocks(e, E4M3, None, torch.ones(e.shape[0], device="cuda"))
    assert not guard.any()
    for a, u, b, v, _ in (forms, again):
        assert (u[0, -1].item(), u[0, 0].item(), a[-1, -1].item()) == (2.0**-4, 2.0**-8, 48)
        assert (v[-1, -1].item(), b[-1, -1].item()) == (2.0**-4, 48)
        assert (v[:-1] == 2.0**-8).all()
        assert (v[:, :-1] == 2.0**-8).all()


def test_more_than_2_to_the_31_elements():
    e = torch.ones(2**19 + 16, 4112, dtype=torch.bfloat16, device="cuda")
    e[-1, -1] = 3.0
    s = torch.ones(e.shape[0], device="cuda")
    a, u, b, v, _ = ops.quantize_grad_blocks(e, E4M3, None, s)
    for q, scale in ((a, u), (b, v)):
        assert (q[-1, -1].item(), scale[-1, -1].item()) == (48, 2.0**-4)
        assert (q[-1, -2].item(), q[0, 0].item()) == (16, 256)
    del a, b, q
    data, scale = ops.quantize_tiles(e, E4M3)
    assert (data[-1, -1].item(), scale[-1, -1].item(), data[0, 0].item()) == (48, 2.0**-4, 256)
