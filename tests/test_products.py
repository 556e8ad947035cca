"""The 8-bit products that round a weight on the way or rotate their result: the bits of the steps one by one, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halo_train import ops
from halo_train.ops import reference
from halo_train.ops.reference import SCALE_BLOCK

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.float8_e4m3fn, torch.int8]
OUTPUTS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rounded(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return ops.quantize_rows(torch.randn(rows, columns).to(device), dtype)


def exact(data: Tensor, scale: Tensor) -> Tensor:
    return data.double() * scale.double()[:, None]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("layout", ["dense", "every second row", "transposed"])
def test_a_weight_rounded_on_the_way_has_the_bits_of_one_rounded_before(device, dtype, out_dtype, layout):
    weight = torch.randn(96, 64, dtype=torch.bfloat16, device=device)
    if layout != "dense":
        weight = weight[::2] if layout == "every second row" else weight.t()
    n, k = weight.shape
    d = torch.exp2(torch.randint(-3, 4, (k,), device=device).float())
    a, u = rounded(48, k, dtype, device)
    block = k & -k
    rows, columns = ops.quantize_rows, ops.quantize_rows_transposed
    if out_dtype == torch.float64:  # the reference on every device
        rows, columns = reference.quantize_rows, reference.quantize_rows_transposed
    data, scale = rows(weight, dtype, block, d)
    expected = ops.scaled_matmul(a, data, u, scale, out_dtype)
    product, found_scale = ops.matmul_weight_rows(a, u, weight, block, d, out_dtype)
    assert torch.equal(product, expected)
    assert torch.equal(found_scale, scale)
    assert expected.shape == (48, n)
    assert expected.dtype is out_dtype
    a, u = rounded(48, n, dtype, device)
    for factors in (None, torch.rand(n, device=device) + 0.5):
        data, c = columns(weight, dtype, factors)
        expected = ops.scaled_matmul(a, data, u, c, out_dtype)
        assert torch.equal(ops.matmul_weight_columns(a, u, weight, factors, dtype, out_dtype), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_columns_of_a_weight_have_a_format_of_their_own(device, gradients):
    weight = torch.randn(64, 48, dtype=torch.bfloat16, device=device)
    a, u = rounded(32, 64, gradients, device)
    c = ops.quantize_rows_transposed(weight, torch.float8_e4m3fn)
    product = ops.matmul_weight_columns(a, u, weight, None, torch.float8_e4m3fn, torch.float32)
    assert relative(product, exact(a, u) @ exact(*c).t()) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_result_is_rotated_and_scaled(device, dtype, out_dtype, block, with_factors):
    (a, u), (b, v) = rounded(48, 64, dtype, device), rounded(96, 64, dtype, device)
    d = torch.exp2(torch.randint(-3, 4, (96,), device=device).float()) if with_factors else None
    y = ops.matmul_rotated(a, b, u, v, False, block, d, out_dtype)
    assert torch.equal(y, ops.matmul_rotated(a, ops.transpose_bytes(b), u, v, True, block, d, out_dtype))
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    blocks = torch.block_diag(*[h / math.sqrt(block)] * (96 // block)).to(device)
    expected = exact(a, u) @ exact(b, v).t() @ blocks
    assert relative(y, expected if d is None else expected * d) < max(2e-3, 2 * torch.finfo(out_dtype).eps)
    assert y.dtype is out_dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("column_scales", [False, True])
def test_a_product_over_rows_has_scales_of_columns(device, dtype, column_scales):
    (a, u), (b, _) = rounded(48, 32, dtype, device), rounded(32, 64, dtype, device)
    v = torch.rand(64, device=device) if column_scales else torch.tensor(0.5, device=device)
    y = ops.matmul_rows(a, b, u, v, torch.float32)
    assert relative(y, exact(a, u) @ b.double() * v) < 2e-3


def codes(rows: int, k: int, device: str) -> Tensor:
    return (100 * torch.randn(rows, k)).clamp(-448, 448).to(torch.float8_e4m3fn).to(device)


def block_scales(rows: int, k: int, device: str, exponents: tuple[int, int]) -> Tensor:
    blocks = -(-k // SCALE_BLOCK)
    return torch.exp2(torch.randint(*exponents, (blocks, rows)).float()).to(device)


def exact_in_blocks(data: Tensor, scale: Tensor) -> Tensor:
    block_of = torch.arange(data.shape[1], device=data.device) // SCALE_BLOCK
    return data.double() * scale.double()[block_of].t()


def of_tiles(scale: Tensor, rows: int, k: int) -> Tensor:
    """Scales [blocks of k, blocks of rows] of each element [rows, k], in float64."""
    each = scale.double().t().repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)
    return each[:rows, :k]


BLOCKED = [
    (48, 64, 256),
    (32, 48, 384),
    (17, 48, 1040),
    (1, 16, 16),
    (129, 272, 2064),
    (300, 208, 656),
    (0, 32, 64),
    (16, 32, 0),
]
MANY_TILES = [(4097, 4112, 1552), (2560, 4096, 4112), (30000, 304, 272), (4097, 4112, 128)]
"""(m, n, k); the last block is whole or has 16 elements, or one step of 128 with or without others."""


@pytest.mark.parametrize(
    ("device", "m", "n", "k"),
    [
        *[("cpu", *shape) for shape in BLOCKED],
        *[pytest.param("cuda", *shape, marks=pytest.mark.gpu) for shape in [*BLOCKED, *MANY_TILES]],
    ],
)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("exponents", [(-2, 3), (-50, 20)])
def test_rows_have_a_scale_for_each_block_of_the_contraction(device, m, n, k, out_dtype, exponents):
    a, b, u = codes(m, k, device), codes(n, k, device), block_scales(m, k, device, exponents)
    if k:
        u = u / u.amax(0)
    v = torch.rand(n, device=device) * 1e-4  # results in the range of float16
    y = ops.scaled_matmul(a, b, u, v, out_dtype)
    assert y.dtype is out_dtype
    bound = max(2e-3, 2 * torch.finfo(out_dtype).eps)
    expected = exact_in_blocks(a, u) @ b.double().t() * v
    if y.numel() and k:
        assert relative(y, expected) < bound
    else:
        assert torch.equal(y.double(), expected)
    for rows in (False, True):
        other = b.t().contiguous() if rows else b
        assert torch.equal(ops.matmul_rotated(a, other, u, v, rows, 1, None, out_dtype), y)
    assert torch.equal(ops.matmul_rows(a, b.t().contiguous(), u, v, out_dtype), y)
    assert torch.equal(
        ops.scaled_matmul(a, b, u, v.new_tensor(0.5), torch.float32),
        ops.scaled_matmul(a, b, u, v.new_full((n,), 0.5), torch.float32),
    )


@pytest.mark.parametrize(
    ("device", "m", "n", "k"),
    [
        *[("cpu", *shape) for shape in BLOCKED],
        *[pytest.param("cuda", *shape, marks=pytest.mark.gpu) for shape in [*BLOCKED, *MANY_TILES]],
    ],
)
@pytest.mark.parametrize("out_dtype", OUTPUTS)
@pytest.mark.parametrize("exponents", [(-2, 3), (-24, 10)])
def test_the_other_operand_has_a_scale_for_each_tile(device, m, n, k, out_dtype, exponents):
    a, b = codes(m, k, device), codes(n, k, device)
    u, v = block_scales(m, k, device, exponents), block_scales(-(-n // SCALE_BLOCK), k, device, exponents)
    if k:
        u, v = u / u.amax(0), v / v.amax(0) * 2.0**-13  # results in the range of float16
    y = ops.scaled_matmul(a, b, u, v, out_dtype)
    assert y.dtype is out_dtype
    expected = exact_in_blocks(a, u) @ (b.double() * of_tiles(v, n, k)).t()
    if y.numel() and k:
        assert relative(y, expected) < max(2e-3, 2 * torch.finfo(out_dtype).eps)
    else:
        assert torch.equal(y.double(), expected)
    assert torch.equal(ops.matmul_rows(a, b.t().contiguous(), u, v, out_dtype), y)
    equal = torch.full_like(v, 0.25)
    columns = torch.full((n,), 0.25, device=device)
    assert torch.equal(
        ops.scaled_matmul(a, b, u, equal, torch.float32), ops.scaled_matmul(a, b, u, columns, torch.float32)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [*BLOCKED, *MANY_TILES])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tiles", [False, True])
def test_block_scales_have_the_bits_of_the_reference(m, n, k, out_dtype, tiles):
    # Sums of products have no more bits than the tensor cores keep.
    a, b = (torch.randint(-2, 3, (rows, k)).to(torch.float8_e4m3fn) for rows in (m, n))
    u, v = block_scales(m, k, "cpu", (-3, 0)), torch.rand(n)
    if tiles:
        v = block_scales(-(-n // SCALE_BLOCK), k, "cpu", (-2, 1))
    expected = reference.scaled_matmul(a, b, u, v, torch.float32)
    y = ops.scaled_matmul(a.cuda(), b.cuda(), u.cuda(), v.cuda(), out_dtype)
    assert torch.equal(y.cpu(), expected.to(out_dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [0, -10, -30, -60, -100])
def test_blocks_of_zeros_leave_the_sums_alone(device, exponent):
    k = 4 * SCALE_BLOCK
    a, b = codes(48, k, device), codes(64, k, device)
    u = torch.full((4, 48), 2.0**exponent, device=device)
    for block in (0, 2, 3):
        a[:, block * SCALE_BLOCK : (block + 1) * SCALE_BLOCK] = 0
        u[block] = 1
    y = ops.scaled_matmul(a, b, u, torch.ones(64, device=device), torch.float32)
    assert relative(y, exact_in_blocks(a, u) @ b.double().t()) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_in_a_block_stays_in_its_row(device, out_dtype):
    k = 3 * SCALE_BLOCK
    a, b, u = codes(48, k, device), codes(64, k, device), block_scales(48, k, device, (-2, 3))
    not_finite = {}
    for block in range(3):
        for i, scale in enumerate((None, float("inf"), float("nan"))):
            row = 5 * (3 * block + i)
            not_finite[row] = scale
            if scale is None:
                a.view(torch.uint8)[row, block * SCALE_BLOCK + 7] = 0x7F
            else:
                u[block, row] = scale
    y = ops.scaled_matmul(a, b, u, torch.ones(64, device=device), out_dtype)
    for row in range(48):
        assert y[row].isfinite().all() if row not in not_finite else not y[row].isfinite().any(), row


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_in_a_tile_stays_in_its_columns(device, bad):
    n, k = 3 * SCALE_BLOCK, 4 * SCALE_BLOCK
    a, b, u = codes(48, k, device), codes(n, k, device), block_scales(48, k, device, (-2, 3))
    for block in range(4):
        v = block_scales(3, k, device, (-2, 3))
        v[block, 1] = bad
        y = ops.scaled_matmul(a, b, u, v, torch.float32)
        assert not y[:, SCALE_BLOCK : 2 * SCALE_BLOCK].isfinite().any()
        assert y[:, :SCALE_BLOCK].isfinite().all()
        assert y[:, 2 * SCALE_BLOCK :].isfinite().all()


@pytest.mark.gpu
def test_block_scales_in_a_cuda_graph_have_the_same_bits_again_and_again():
    a, b = codes(4000, 4096, "cuda"), codes(2064, 4096, "cuda")
    u, v = block_scales(4000, 4096, "cuda", (-4, 4)), torch.rand(2064, device="cuda")
    expected = ops.scaled_matmul(a, b, u, v, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.scaled_matmul(a, b, u, v, torch.bfloat16)
    for _ in range(20):  # any order of the thread blocks
        graph.replay()
        assert torch.equal(captured, expected)
    equal = torch.full_like(u, 0.25)
    assert torch.equal(
        ops.scaled_matmul(a, b, equal, v, torch.float32), ops.scaled_matmul(a, b, equal[0], v, torch.float32)
    )


@pytest.mark.gpu
def test_block_scales_need_a_product_that_the_kernel_takes():
    a, b, u, v = codes(32, 64, "cuda"), codes(48, 64, "cuda"), torch.ones(1, 32).cuda(), torch.ones(48).cuda()
    for arguments in ((b[:40], v[:40], True), (b, v, False)):
        data, scale, fast = arguments
        with pytest.raises(RuntimeError, match=r"multiples of 16.*fast_accum=True; use one scale a row"):
            ops.scaled_matmul(a, data, u, scale, torch.bfloat16, fast)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_opcheck(device, dtype):
    weight, d = torch.randn(32, 64, device=device), torch.ones(64, device=device)
    (a, u), (b, v), (e, t) = (rounded(16, n, dtype, device) for n in (64, 64, 32))
    namespace, out = torch.ops.halo_train, torch.bfloat16
    # The check of the schema compares the arguments before and after, for which float8 has no arithmetic.
    utils = [
        "test_autograd_registration",
        "test_faketensor",
        *(["test_schema"] if dtype == torch.int8 else []),
    ]

    def check(op, *args):
        torch.library.opcheck(op, args, test_utils=utils)

    if dtype != torch.int8:
        check(namespace.scaled_matmul, a, b, u, v, out, True)
    check(namespace.matmul_rows, e, b[:, :32].t().contiguous(), t, t.new_ones(16), out, True)
    check(namespace.matmul_weight_rows, a, u, weight, 64, d, out, True)
    for factors in (None, weight.new_ones(32)):
        check(namespace.matmul_weight_columns, e, t, weight, factors, dtype, out, True)
    tokens = rounded(32, 32, dtype, device)
    in_blocks = (
        [False, True] if dtype != torch.int8 and (device == "cpu" or ops.takes_blocks(weight)) else [False]
    )
    for factors in (None, d):
        for columns in in_blocks:
            check(namespace.matmul_rounded, weight, factors, weight, factors, dtype, 64, out, True, columns)
    for blocks in in_blocks:
        for sums, factors in ((False, None), (True, t.new_ones(32))):
            others = (dtype, 16, factors, out, sums, True, blocks)
            operands = (weight, d, weight.t()[:, :32], None, *tokens, t.new_ones(32))
            check(namespace.matmul_gradients, *operands, *others)
            if blocks:  # square tokens: their columns
                by_columns = (*operands[:-1], t.new_ones(1, 1))
                check(namespace.matmul_gradients, *by_columns, dtype, 1, None, out, sums, True, True)
    check(namespace.matmul_rotated, a, b, u, v, False, 16, None, out, True)
    check(namespace.matmul_rotated, a, b.t().contiguous(), u, v, True, 16, None, out, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("with_factors", [False, True])
def test_steps_in_one_operator_have_the_bits_of_steps_one_by_one(device, dtype, with_factors):
    x, weight, e = (
        torch.randn(s, dtype=torch.bfloat16, device=device) for s in ((48, 64), (96, 64), (48, 96))
    )
    d, levels = (2.0 ** torch.randint(-3, 4, (n,), device=device) if with_factors else None for n in (64, 96))
    inverse = None if d is None else 1 / d
    out = torch.bfloat16
    y, data, scale, tiles, weight_scale = ops.matmul_rounded(x, inverse, weight, d, dtype, 64, out)
    one_by_one = ops.quantize_rows(x, dtype, 64, inverse)
    expected = (*ops.matmul_weight_rows(*one_by_one, weight, 64, d, out), *one_by_one)
    for mine, other in zip((y, weight_scale, data, scale), expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    assert tiles.shape == (0,)

    divisors, ones = None if levels is None else 1 / levels, torch.ones(64, device=device)
    for sums, block in ((False, 1), (True, 64)):
        others = (dtype, block, d, out, sums)
        found = ops.matmul_gradients(e, levels, weight, divisors, data, scale, ones, *others)
        rows, row_scales, columns, column_scales, total = ops.quantize_grad(e, dtype, levels, scale, sums)
        dx = ops.matmul_weight_columns(rows, row_scales, weight, divisors, dtype, out)
        dw = ops.matmul_rotated(columns, data, column_scales, ones, True, block, d, out)
        for mine, other in zip(found, (dx, dw, total), strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_by_columns_in_one_operator_have_the_bits_of_steps_one_by_one(device):
    if device == "cuda" and not ops.takes_blocks(torch.empty(0, device=device)):
        pytest.skip("scales for blocks need Hopper")
    x, weight, e = (
        torch.randn(s, dtype=torch.bfloat16, device=device) for s in ((560, 64), (96, 64), (560, 96))
    )
    dtype, out = torch.float8_e4m3fn, torch.bfloat16
    y, data, scale, tiles, weight_scale = ops.matmul_rounded(
        x, None, weight, None, dtype, 64, out, True, True
    )
    rows, row_scales = ops.quantize_rows(x, dtype, 64, None)
    expected = (
        *(row_scales, *ops.matmul_weight_rows(rows, row_scales, weight, 64, None, out)),
        *ops.quantize_tiles(x, dtype, row_scales),
    )
    for mine, other in zip((scale, y, weight_scale, data, tiles), expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    given = (weight, None, data, scale, tiles, dtype, 1, None, out, False, True, True)
    found = ops.matmul_gradients(e, None, *given)
    for_dx, u, for_dw, v, _ = ops.quantize_grad_blocks(e, dtype, None, scale)
    dx = ops.matmul_weight_columns(for_dx, u, weight, None, dtype, out)
    dw = ops.scaled_matmul(for_dw, data, v, tiles, out)
    for mine, other in zip(found, (dx, dw), strict=False):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    exact = e.double().t() @ x.double()
    assert (dw.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
def test_float8_products_in_a_cuda_graph_have_the_same_bits():
    weight = torch.randn(128, 64, dtype=torch.bfloat16, device="cuda")
    a, u = rounded(48, 64, torch.float8_e4m3fn, "cuda")
    expected, _ = ops.matmul_weight_rows(a, u, weight, 64, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = ops.matmul_weight_rows(a, u, weight, 64, None, torch.bfloat16)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_operands_that_do_not_fit_are_refused():
    (a, u), (b, v) = rounded(16, 64, torch.int8, "cpu"), rounded(32, 48, torch.int8, "cpu")
    with pytest.raises(ValueError, match=r"contracted dimensions are equal; got \(16, 64\) and \(32, 48\)"):
        ops.scaled_matmul(a, b, u, v, torch.float32)
    with pytest.raises(ValueError, match="scale_b must have one value or one for each of 16 rows"):
        ops.scaled_matmul(a, a, u, v, torch.float32)
    with pytest.raises(
        ValueError, match=r"must be float8_e4m3fn where .* got torch.int8; use one scale a row"
    ):
        ops.scaled_matmul(a, a, u[None], u, torch.float32)
    gradients = a.to(torch.float8_e4m3fn)
    for op in (ops.scaled_matmul, ops.matmul_rows):
        with pytest.raises(
            ValueError, match=r"scale_a must have shape \(1, 16\), .* each row; got \(16, 1\)"
        ):
            op(
                gradients,
                gradients if op is ops.scaled_matmul else gradients.t(),
                u[:, None],
                u,
                torch.float32,
            )
    with pytest.raises(ValueError, match="contracted dimensions"):
        ops.matmul_weight_columns(a, u, torch.randn(48, 16), None, torch.int8, torch.float32)
    with pytest.raises(ValueError, match="row_scale must be a real vector"):
        ops.matmul_weight_columns(a, u, torch.randn(64, 16), torch.ones(3), torch.int8, torch.float32)
    with pytest.raises(ValueError, match="block must be a power of two"):
        ops.matmul_weight_rows(a, u, torch.randn(48, 64), 48, None, torch.float32)
    with pytest.raises(ValueError, match="col_scale must be a real vector"):
        ops.matmul_rotated(a, a, u, u, False, 16, torch.ones(3), torch.float32)
    x, weight, wide = torch.randn(16, 64), torch.randn(48, 64), torch.randn(48, 32)
    with pytest.raises(ValueError, match=r"contracted dimensions are equal; got \(16, 64\) and \(48, 32\)"):
        ops.matmul_rounded(x, None, wide, None, torch.int8, 16, torch.float32)
    with pytest.raises(ValueError, match="col_scale must be a real vector"):
        ops.matmul_rounded(x, torch.ones(3), weight, None, torch.int8, 16, torch.float32)
    others = (torch.int8, 16, None, torch.float32, False)
    with pytest.raises(ValueError, match="contracted dimensions"):
        ops.matmul_gradients(x, None, weight, None, a, u, torch.ones(64), *others)
    with pytest.raises(ValueError, match=r"x must have shape \(16, 48\); got \(16, 64\)"):
        ops.matmul_gradients(x, None, weight.t(), None, a, u, torch.ones(48), *others)
    with pytest.raises(ValueError, match="weight_row_scale must be a real vector"):
        ops.matmul_gradients(x, None, weight.t(), torch.ones(3), a[:, :48], u, torch.ones(48), *others)
    for scales, blocks in ((torch.ones(1, 1), False), (torch.ones(2, 1), True)):
        with pytest.raises(ValueError, match=r"x_col_scale of a matrix must have shape \(1, 1\), and blocks"):
            ops.matmul_gradients(x, None, weight.t(), None, a[:, :48].t(), u, scales, *others, True, blocks)
    with pytest.raises(ValueError, match="row_scale must be None where scale_a has a value for each block"):
        ops.matmul_weight_columns(
            gradients, u[None], weight.t(), torch.ones(64), torch.float8_e4m3fn, torch.float32
        )
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*torch.int8"):
        ops.matmul_rounded(x, None, weight, None, torch.int8, 16, torch.float32, True, True)
