"""The CUDA Hadamard kernel against float64 rounded once, over every size, type and layout that the op accepts."""

from __future__ import annotations

import math

import pytest
import torch
from hadamard_oracle import DTYPES, HALF, assert_rounded_once, expected, randn

from halo_train import hadamard_transform, ops

pytestmark = pytest.mark.gpu

SIZES = [2**k for k in range(16)]

# Before Hopper few float32 blocks of 32768 are halved, but not in place, and halves add in another order.
PAIRS = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_matches_float64(n: int, dtype: torch.dtype) -> None:
    rows = max(3, (1 << 20) // n + 1)
    x = randn(rows, n, dtype=dtype, seed=n)
    scale = 1 / math.sqrt(n)
    assert_rounded_once(ops.hadamard(x, n, scale), expected(x, n, scale), n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [16, 64, 256, 1024, 4096, 32768])
def test_every_basis_vector(n: int, dtype: torch.dtype) -> None:
    """Natural (Sylvester) order, each sign: the product with the identity is the matrix, and it is exact."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    index = torch.arange(0, n, max(1, n // 1024), device="cuda")
    x = torch.zeros(len(index), n, device="cuda", dtype=dtype)
    x[torch.arange(len(index)), index] = 1
    y = ops.hadamard(x, n, 1.0)
    if n <= 4096:
        matrix = torch.from_numpy(scipy_linalg.hadamard(n)).to("cuda", dtype)
        assert torch.equal(y, matrix[index])
    assert torch.equal(y.double(), expected(x, n, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Nothing is rounded before the end, not even inside the tensor cores."""
    for n in (32, 512, 2048, 8192, 32768):
        x = torch.randint(-127, 128, (9, n), device="cuda").to(dtype)
        x[:, 0] = 127
        exact = expected(x, n, 2.0**-8)
        assert torch.equal(ops.hadamard(x, n, 2.0**-8), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("axis", "block"), [(96, 32), (14336, 2048), (12288, 4096), (6, 2), (40, 8), (24, 1), (65536, 16384)]
)
def test_block_diagonal_with_signs(axis: int, block: int, dtype: torch.dtype) -> None:
    x = randn(7, axis, dtype=dtype)
    signs = (torch.randint(0, 2, (axis,), device="cuda") * 2 - 1).to(torch.int8)
    scale = 0.37
    assert_rounded_once(ops.hadamard(x, block, scale, signs), expected(x, block, scale, signs), block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n", SIZES)
def test_factors_after_the_rotation(n: int, blocks: int, dtype: torch.dtype) -> None:
    """Any float32 factor of each column, in the same rounding; with signs, in place, rows of several blocks."""
    rows = max(3, min(137, (1 << 18) // n))
    x = randn(rows, blocks * n, dtype=dtype)
    factors = randn(blocks * n, dtype=torch.float32, seed=1) * torch.exp2(
        torch.randint(-2, 3, (blocks * n,), device="cuda").float()
    )
    signs = torch.randint(0, 2, (blocks * n,), device="cuda") * 2 - 1
    scale = 1 / math.sqrt(n)
    for s in (None, signs):
        y = ops.hadamard(x, n, scale, s, factors)
        assert_rounded_once(y, expected(x, n, scale, s), n, factors)
        assert torch.equal(ops.hadamard(x, n, scale, s, factors), y)
        z = x.clone()
        ops.hadamard_(z, n, scale, s, factors)
        if n < 32768 or dtype in HALF or PAIRS:
            assert torch.equal(z, y)
        assert_rounded_once(z, expected(x, n, scale, s), n, factors)
    ones = ops.hadamard(x, n, scale, None, torch.ones_like(factors))
    torch.testing.assert_close(ones, ops.hadamard(x, n, scale))
    if dtype in HALF and n > 1:
        assert (ones != ops.hadamard(x, n, scale)).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 64, 1024, 8192])
def test_factors_of_any_layout(n: int, dtype: torch.dtype) -> None:
    base = randn(9, n + 16, dtype=dtype)
    factors = randn(2 * n + 2, dtype=torch.float32, seed=1)
    for x in (base[:, :n], base[:, 3 : n + 3], base[:, 8 : n + 8], base[::2, :n]):
        for f in (factors[:n], factors[1 : n + 1], factors[: 2 * n : 2], factors[:n].double()):
            y = ops.hadamard(x, n, 0.3, None, f)
            assert_rounded_once(y, expected(x.contiguous(), n, 0.3), n, f)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4, 64, 256, 2048, 4096, 16384])
def test_layouts(n: int, dtype: torch.dtype, signed: bool) -> None:
    """Row strides, offsets that are not aligned to 16 bytes, transposed and expanded inputs."""
    signs = (torch.randint(0, 2, (n,), device="cuda") * 2 - 1).to(dtype) if signed else None
    base = randn(6, 5, 3 * n + 8, dtype=dtype)
    views = {
        "columns": base[0, :, :n],
        "columns of 3 axes": base[:, :, n : 2 * n],
        "columns, unaligned": base[:, :, 3 : n + 3],
        "every other row": base[:, ::2, :n],
        "reversed axes": base[:, :, :n].transpose(0, 1),
        "offset": base.flatten()[1 : 1 + 7 * n].view(7, n),
        "last axis strided": base.flatten()[: 14 * n].view(7, n, 2)[..., 0],
        "columns first": randn(n, 9, dtype=dtype).t(),
        "expanded rows": base[0, :1, :n].expand(4, n),
        "one row": base[0, 0, :n],
    }
    for name, x in views.items():
        y = ops.hadamard(x, n, 1 / math.sqrt(n), signs)
        exact = expected(x.contiguous(), n, 1 / math.sqrt(n), signs)
        assert torch.equal(y, ops.hadamard(x.contiguous(), n, 1 / math.sqrt(n), signs)), name
        assert_rounded_once(y, exact, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8, 128, 2048, 16384, 32768])
def test_in_place(n: int, dtype: torch.dtype) -> None:
    """The same values in x itself, whether its rows are dense, strided or unaligned; its neighbours stay."""
    signs = torch.randint(0, 2, (n,), device="cuda") * 2 - 1
    base = randn(301, n + 24, dtype=dtype)
    for start in (0, 8, 3):
        for rows in (301, 5):
            whole = base[:rows].clone()
            x = whole[:, start : start + n]
            before = x.clone()
            ops.hadamard_(x, n, 1 / math.sqrt(n), signs)
            assert_rounded_once(x.contiguous(), expected(before, n, 1 / math.sqrt(n), signs), n)
            whole[:, start : start + n] = base[:rows, start : start + n]
            assert torch.equal(whole, base[:rows])
    dense = base[:, :n].contiguous()
    before, pointer = dense.clone(), dense.data_ptr()
    ops.hadamard_(dense, n, 1 / math.sqrt(n))
    assert dense.data_ptr() == pointer
    assert_rounded_once(dense, expected(before, n, 1 / math.sqrt(n)), n)


@pytest.mark.parametrize("n", [32, 64, 128, 256, 512, 1024, 4096])
def test_row_counts_and_determinism(n: int) -> None:
    """Every count gives the first rows of the largest one, bit for bit (HadaCore races on odd counts)."""
    counts = [*range(1, 41), 8193, 20004, 65540] if n <= 512 else [*range(1, 41), 8193]
    x = randn(max(counts), n)
    y = ops.hadamard(x, n, 1 / math.sqrt(n))
    for _ in range(3):
        assert torch.equal(ops.hadamard(x, n, 1 / math.sqrt(n)), y)
    for rows in counts:
        assert torch.equal(ops.hadamard(x[:rows], n, 1 / math.sqrt(n)), y[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [8192, 16384, 32768])
def test_few_rows_are_halved_with_the_same_bits(n: int, dtype: torch.dtype) -> None:
    if n == 32768 and dtype not in HALF and not PAIRS:
        pytest.skip("float32 halves add in another order")
    x = randn(1100, n, dtype=dtype)
    y = ops.hadamard(x, n, 1 / math.sqrt(n))
    for rows in (1, 2, 40, 131, 132, 133, 263, 264, 265, 527, 528, 529):
        assert torch.equal(ops.hadamard(x[:rows], n, 1 / math.sqrt(n)), y[:rows]), rows
        z = x[:rows].clone()
        ops.hadamard_(z, n, 1 / math.sqrt(n))
        assert torch.equal(z, y[:rows]), rows


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 16), (0,)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, device="cuda", dtype=dtype)
    y = hadamard_transform(x)
    assert y.shape == x.shape
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_dimension_with_gaps(dtype: torch.dtype) -> None:
    x = randn(512, dtype=dtype)[::2]
    assert torch.equal(ops.hadamard(x, 256, 0.5), ops.hadamard(x.contiguous(), 256, 0.5))


@pytest.mark.parametrize("rows", [1, 40, 263, 264, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_block_at_every_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Few blocks of 32768 are halved over two thread blocks, many are not; those of float32 always are on Hopper."""
    wide = randn(rows, 2 * 32768, dtype=dtype)
    signs = torch.randint(0, 2, (2 * 32768,), device="cuda") * 2 - 1
    y = ops.hadamard(wide, 32768, 2.0**-7, signs)
    assert_rounded_once(y, expected(wide, 32768, 2.0**-7, signs), 32768)
    strided = ops.hadamard(wide[:, 32768:], 32768, 2.0**-7)
    assert_rounded_once(strided, expected(wide[:, 32768:], 32768, 2.0**-7), 32768)


@pytest.mark.parametrize("n", [2, 128, 2048, 32768])
def test_more_than_2_31_elements(n: int) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    rows = (2**31 + 2**20) // n + 1
    x = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4000)  # positive values between 2^-7 and 2
    y = ops.hadamard(x, n, 1 / math.sqrt(n))
    for part in (slice(0, 2), slice(2**31 // n - 1, 2**31 // n + 2), slice(rows - 2, rows)):
        assert_rounded_once(y[part], expected(x[part], n, 1 / math.sqrt(n)), n)


@pytest.mark.parametrize("n", [8, 256, 8192])
def test_infinities_stay_in_their_row(n: int) -> None:
    x = randn(33, n)
    y = ops.hadamard(x, n, 1.0)
    bad = x.clone()
    bad[5, n // 2] = math.inf
    bad[6, 0] = math.nan
    z = ops.hadamard(bad, n, 1.0)
    assert not torch.isfinite(z[5:7]).any()
    keep = [row for row in range(33) if row not in (5, 6)]
    assert torch.equal(z[keep], y[keep])


def test_large_fp16_values_do_not_overflow() -> None:
    x = torch.full((3, 4096), 60000.0, device="cuda", dtype=torch.float16)
    y = ops.hadamard(x, 4096, 1 / 4096)
    assert torch.equal(y[:, 0], x[:, 0])
    assert not y[:, 1:].any()


@pytest.mark.parametrize("n", [1, 2, 64, 1024, 32768])
def test_float64(n: int) -> None:
    x = randn(5, n, dtype=torch.float64)
    signs = torch.randint(0, 2, (n,), device="cuda") * 2 - 1
    torch.testing.assert_close(
        ops.hadamard(x, n, 0.5, signs), expected(x, n, 0.5, signs), rtol=1e-13, atol=1e-12
    )
    factors = randn(n, dtype=torch.float64, seed=1)
    y, exact = ops.hadamard(x, n, 0.5, signs, factors), expected(x, n, 0.5, signs) * factors
    torch.testing.assert_close(y, exact, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_backward(axis: int) -> None:
    x = randn(4, 8, 16, dtype=torch.float64).requires_grad_()
    signs = (torch.randint(0, 2, (x.shape[axis],), device="cuda") * 2 - 1).double()
    assert torch.autograd.gradcheck(lambda t: hadamard_transform(t, axis=axis, signs=signs), (x,))
    h = randn(6, 4096).requires_grad_()
    grad = randn(6, 4096, seed=1)
    hadamard_transform(h).backward(grad)
    assert h.grad is not None
    assert torch.equal(h.grad, hadamard_transform(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = randn(5, 512, dtype=dtype).requires_grad_()
    signs = torch.ones(512, device="cuda")
    torch.library.opcheck(torch.ops.halo_train.hadamard.default, (x, 256, 0.5, None))
    torch.library.opcheck(torch.ops.halo_train.hadamard.default, (x[:, 1:257], 64, 0.5, signs[:256]))
    torch.library.opcheck(torch.ops.halo_train.hadamard_.default, (x.detach().clone(), 256, 0.5, signs))


def test_compiles_without_a_graph_break() -> None:
    x = randn(33, 1024).requires_grad_()
    compiled = torch.compile(lambda t: hadamard_transform(t * 2) + 1, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, hadamard_transform(x * 2) + 1)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("n", [128, 2048, 32768])
def test_cuda_graph_and_streams(n: int) -> None:
    x = randn(64, n)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        hadamard_transform(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hadamard_transform(x)
    x.copy_(randn(64, n, seed=5))
    graph.replay()
    assert torch.equal(y, hadamard_transform(x))


def test_rejects_what_the_kernel_cannot_do() -> None:
    with pytest.raises(RuntimeError, match="bfloat16, float16, float32 or float64"):
        torch.ops.halo_train.hadamard(
            torch.zeros(4, 4, device="cuda", dtype=torch.float8_e4m3fn), 4, 1.0, None
        )
    with pytest.raises(RuntimeError, match="divides the last axis"):
        torch.ops.halo_train.hadamard(torch.zeros(4, 6, device="cuda"), 4, 1.0, None)


@pytest.mark.multi_gpu
def test_device_of_the_tensor_not_the_current_one() -> None:
    x = randn(9, 16384)
    with torch.cuda.device(0):
        for n in (128, 16384, 32768):
            other = x.reshape(-1)[: 4 * n].view(4, n).to("cuda:1")
            y = ops.hadamard(other, n, 1 / math.sqrt(n))
            assert y.device == other.device
            assert torch.cuda.current_device() == 0
            assert torch.equal(y.cpu(), ops.hadamard(other.to("cuda:0"), n, 1 / math.sqrt(n)).cpu())
