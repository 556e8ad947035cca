"""The quantising kernels against the reference on the CPU: equal bit by bit where the arithmetic is the same."""

from __future__ import annotations

import pytest
import torch
from quantize_oracle import assert_nearly_same_codes, bits

from halo_train import ops
from halo_train.ops import reference

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 1),
    (3, 7),
    (5, 16),
    (33, 48),
    (100, 264),
    (257, 1000),
    (64, 4096),
    (130, 6144),
    (40, 14336),
    (20, 28672),
]
SHAPES += [(7, 32768), (5, 40000), (513, 136), (3, 131072)]
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def assert_same(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for mine, true in zip(ours, expected, strict=True):
        assert mine.shape == true.shape
        different = bits(mine.cpu()) != bits(true)
        assert not different.any(), (
            f"{different.sum()} bytes differ, first at {different.nonzero()[0].tolist()}"
        )


def example(m: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = (torch.randn(m, n) * torch.exp(torch.randn(m, 1))).to(dtype)
    if m > 3:
        x[1] = 0
    return x, torch.exp2(torch.randint(-4, 5, (n,)).float()) * 1.37, torch.rand(m) + 0.1


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_op_gives_the_bits_of_the_reference(m, n, dtype, fmt):
    x, col_scale, row_scale = example(m, n, dtype)
    gx, gc, gr = x.cuda(), col_scale.cuda(), row_scale.cuda()
    assert_same(ops.quantize_rows(gx, fmt), reference.quantize_rows(x, fmt))
    assert_same(ops.quantize_rows(gx, fmt, 1, gc), reference.quantize_rows(x, fmt, 1, col_scale))
    assert_same(
        ops.quantize_rows_transposed(gx, fmt, gr), reference.quantize_rows_transposed(x, fmt, row_scale)
    )
    assert_same(ops.quantize_rows_transposed(gx, fmt), reference.quantize_rows_transposed(x, fmt))
    grad = ops.quantize_grad(gx, fmt, None, gr)
    assert_same(grad, reference.quantize_grad(x, fmt, None, row_scale))
    grad = ops.quantize_grad(gx, fmt, gc, gr)
    assert_same(grad, reference.quantize_grad(x, fmt, col_scale, row_scale))
    assert_same((ops.transpose_bytes(grad[0]),), (grad[0].cpu().t(),))
    assert_same(ops.quantize_tensor(gx, fmt), reference.quantize_tensor(x, fmt))
    assert_same(ops.quantize_tensor(gx, fmt, 1, gc), reference.quantize_tensor(x, fmt, 1, col_scale))


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (100, 264), (513, 136), (2051, 1000), (700, 28672), (4096, 512)]
)
def test_column_sums_come_with_both_forms_of_a_gradient(m, n, dtype):
    e, col_scale, row_scale = example(m, n, dtype)
    arguments = (e.cuda(), torch.int8, col_scale.cuda(), row_scale.cuda())
    *forms, sums = ops.quantize_grad(*arguments, column_sums=True)
    assert_same(tuple(forms), tuple(t.cpu() for t in ops.quantize_grad(*arguments)[:4]))
    exact, size = e.double().sum(0), e.double().abs().sum(0)
    assert ((sums.cpu().double() - exact).abs() <= 1e-6 * size).all()
    assert torch.equal(sums, ops.quantize_grad(*arguments, column_sums=True)[4])


ROTATED = [
    (64, 64),
    (96, 32),
    (768, 256),
    (1024, 1024),
    (2048, 2048),
    (1536, 512),
    (11008, 256),
    (14336, 2048),
]
ROTATED += [
    (4096, 4096),
    (12288, 4096),
    (28672, 4096),
    (8192, 8192),
    (24576, 8192),
    (16384, 16384),
    (32768, 16384),
]
ROTATED += [(4096, 128), (32768, 32768), (65536, 32768), (40, 8), (48, 16), (4128, 32), (3072, 1024)]
ROTATED += [
    (5120, 1024),
    (2560, 512),
    (20480, 4096),
    (1024, 512),
    (16, 16),
    (192, 64),
    (2240, 64),
    (2112, 16),
]
ROTATED += [(16384, 4096), (16384, 8192), (24576, 4096), (32768, 4096)]  # large rows of several blocks
ROTATED += [(8960, 256), (10304, 64), (10272, 32), (11264, 1024), (18944, 512), (18432, 2048)]  # lean warps


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("fmt", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("n", "block"), ROTATED)
def test_rotated_rows(n, block, fmt, dtype):
    x, _, _ = example(33, n, dtype)
    d = torch.exp2(torch.randint(-4, 5, (n,)).float())
    for factors in (None, d):
        q, scale = ops.quantize_rows(x.cuda(), fmt, block, None if factors is None else factors.cuda())
        expected, expected_scale = reference.quantize_rows(x.double(), fmt, block, factors)
        torch.testing.assert_close(scale.cpu().double(), expected_scale, rtol=1e-5, atol=0)
        assert_nearly_same_codes(q, expected)
        q, scale = ops.quantize_tensor(x.cuda(), fmt, block, None if factors is None else factors.cuda())
        expected, expected_scale = reference.quantize_tensor(x.double(), fmt, block, factors)
        torch.testing.assert_close(scale.cpu().double(), expected_scale, rtol=1e-5, atol=0)
        assert_nearly_same_codes(q, expected)


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize(
    ("n", "block"),
    [
        (1536, 512),
        (1024, 1024),
        (4096, 4096),
        (11008, 256),
        (12288, 4096),
        (16384, 16384),
        (18432, 2048),
        (16384, 4096),
        (20480, 4096),
        (24576, 8192),
        (28672, 4096),
        (32768, 16384),
    ],
)
def test_rotated_rows_do_not_depend_on_their_number(n, block, dtype):
    x = torch.randn(1023, n, device="cuda").to(dtype)
    d = torch.exp2(torch.randint(-4, 5, (n,), device="cuda").float())
    q, scale = ops.quantize_rows(x, torch.int8, block, d)
    for rows in (0, 1, 2, 5, 130, 1022):
        part, part_scale = ops.quantize_rows(x[:rows], torch.int8, block, d)
        assert torch.equal(part, q[:rows])
        assert torch.equal(part_scale, scale[:rows])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("n", "block"),
    [
        (16384, 16384),
        (16384, 4096),
        (20480, 4096),
        (24576, 8192),
        (28672, 4096),
        (32768, 16384),
        (32768, 32768),
    ],
)
def test_large_rows_are_the_same_from_run_to_run(n, block, scaled):
    x = torch.randn((1 << 26) // n, n, device="cuda").bfloat16()
    d = torch.exp2(torch.randint(-4, 5, (n,), device="cuda").float()) if scaled else None
    q, scale = ops.quantize_rows(x, torch.float8_e4m3fn, block, d)
    for _ in range(20):
        again, again_scale = ops.quantize_rows(x, torch.float8_e4m3fn, block, d)
        assert torch.equal(bits(again), bits(q))
        assert torch.equal(again_scale, scale)
    rows = [0, 131, 132, 777, len(x) - 1]
    expected, expected_scale = reference.quantize_rows(
        x[rows].cpu().double(), torch.float8_e4m3fn, block, None if d is None else d.cpu()
    )
    torch.testing.assert_close(scale[rows].cpu().double(), expected_scale, rtol=1e-5, atol=0)
    assert_nearly_same_codes(q[rows], expected)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("fmt", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("n", "block"),
    [(64, 16), (2048, 2048), (1024, 64), (11008, 256), (12288, 4096), (16384, 16384), (32768, 32768)],
)
def test_nonfinite_values_poison_their_own_rotated_row(n, block, fmt, bad):
    x = torch.randn(300, n, device="cuda").bfloat16()
    clean, clean_scale = ops.quantize_rows(x, fmt, block)
    x[7, n // 3], x[299, n - 1] = bad, bad
    q, scale = ops.quantize_rows(x, fmt, block)
    assert (~torch.isfinite(scale)).nonzero().flatten().tolist() == [7, 299]
    kept = [row for row in range(300) if row not in (7, 299)]
    assert torch.equal(bits(q)[kept], bits(clean)[kept])
    assert torch.equal(scale[kept], clean_scale[kept])
    assert not torch.isfinite(ops.quantize_tensor(x, fmt, block)[1])


def test_rotated_rows_with_gaps_and_nonfinite_values():
    x = torch.randn(40, 5000, device="cuda").bfloat16()
    x[7, 100] = float("inf")
    view = x[:, 8:4104]
    q, scale = ops.quantize_rows(view, torch.float8_e4m3fn, 4096)
    dense, dense_scale = ops.quantize_rows(view.contiguous(), torch.float8_e4m3fn, 4096)
    assert torch.equal(bits(q), bits(dense))
    assert (~torch.isfinite(scale)).nonzero().flatten().tolist() == [7]
    assert torch.equal(scale[:7], dense_scale[:7])


def test_strided_offset_and_empty_inputs():
    x = torch.randn(64, 400).bfloat16()
    for view in (x[:, 3:131], x[::3, :128], x[5:, 8:264], x.t()[:128, :48], x[:, :7]):
        ours = (
            view.cuda()
            if view.is_contiguous()
            else x.cuda().as_strided(view.shape, view.stride(), view.storage_offset())
        )
        row_scale = torch.rand(view.shape[0]) + 0.1
        assert_same(ops.quantize_rows(ours, torch.int8), reference.quantize_rows(view, torch.int8))
        assert_same(
            ops.quantize_rows_transposed(ours, torch.int8, row_scale.cuda()),
            reference.quantize_rows_transposed(view, torch.int8, row_scale),
        )
    for shape in ((0, 16), (3, 0)):
        e = torch.empty(shape)
        ones = torch.ones(shape[1]), torch.ones(shape[0])
        grad = ops.quantize_grad(e.cuda(), torch.int8, ones[0].cuda(), ones[1].cuda())
        assert_same(grad, reference.quantize_grad(e, torch.int8, *ones))
        assert_same(ops.quantize_tensor(e.cuda(), torch.int8), reference.quantize_tensor(e, torch.int8))


def test_nonfinite_values_poison_their_own_row():
    x = torch.randn(64, 128)
    x[3, 5], x[9, 7] = float("nan"), float("inf")
    _, scale = ops.quantize_rows(x.cuda(), torch.float8_e4m3fn)
    assert (~torch.isfinite(scale)).nonzero().flatten().tolist() == [3, 9]
    _, scale = ops.quantize_rows_transposed(x.cuda(), torch.float8_e4m3fn, torch.ones(64).cuda())
    assert (~torch.isfinite(scale)).nonzero().flatten().tolist() == [5, 7]


def test_extreme_magnitudes_equal_the_reference():
    for size in (1e-45, 1e-38, 1e-30, 3e38):
        x = torch.full((2, 16), size)
        assert_same(
            ops.quantize_rows(x.cuda(), torch.float8_e4m3fn), reference.quantize_rows(x, torch.float8_e4m3fn)
        )


def test_repeatable_and_graph_safe():
    x, col_scale, row_scale = (t.cuda() for t in example(1024, 4096, torch.bfloat16))
    expected = ops.quantize_grad(x, torch.float8_e4m3fn, col_scale, row_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_grad(x, torch.float8_e4m3fn, col_scale, row_scale)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, expected, strict=True))


def test_opcheck():
    x, col_scale, row_scale = (t.cuda() for t in example(48, 64, torch.bfloat16))
    namespace = torch.ops.halo_train
    for fmt in FORMATS:
        torch.library.opcheck(namespace.quantize_rows, (x, fmt, 16, col_scale))
        torch.library.opcheck(namespace.quantize_rows_transposed, (x, fmt, row_scale))
        torch.library.opcheck(namespace.quantize_rows_transposed, (x, fmt, None))
        torch.library.opcheck(namespace.quantize_tensor, (x, fmt, 16, col_scale))
        for sums in (False, True):
            torch.library.opcheck(namespace.quantize_grad, (x, fmt, col_scale, row_scale, sums))
            torch.library.opcheck(namespace.quantize_grad, (x, fmt, None, row_scale, sums))
    torch.library.opcheck(namespace.transpose_bytes, (torch.ones(3, 5, dtype=torch.int8, device="cuda"),))


def test_more_than_2_to_the_31_elements():
    x = torch.ones(2**19 + 3, 4112, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 3.0
    q, scale = ops.quantize_rows(x, torch.int8)
    assert scale[-1] == torch.tensor(3.0) / torch.tensor(127.0)
    assert q[-1].tolist() == [42] * 4111 + [127]
    assert (q[0] == 127).all()
    t = ops.transpose_bytes(q)
    assert t[-1, -1] == 127
    assert t[0, -1] == 42
