"""The kernels that fuse norms and gated activations with rounding, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from quantize_oracle import assert_rounds, bits

from halo_train import ops
from halo_train.ops import fused_reference, reference

pytestmark = pytest.mark.gpu

FORMATS = [torch.float8_e4m3fn, torch.int8]
ACTIVATIONS = list(fused_reference.ACTIVATIONS)

# Columns and block: aligned tiles of one and several warps, with and without an exchange, then what takes the other way.
ROTATED = [
    (64, 64),
    (896, 128),
    (1024, 1024),
    (1536, 512),
    (2048, 2048),
    (3072, 1024),
    (4096, 4096),
    (5120, 1024),
]
ROTATED += [(8192, 8192), (12288, 4096), (16384, 16384), (2112, 16), (4096, 32), (11008, 256), (24576, 8192)]
PLAIN = [(8, 1), (1000, 1), (4096, 1), (11008, 1), (16384, 1)]
ODD = [(7, 1), (100, 4), (40, 8), (36864, 4096), (40000, 64), (4100, 4)]
GATED = [(8960, 256), (14336, 2048), (28672, 4096), (32768, 32768), (18944, 512)]


def assert_same_bits(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for mine, true in zip(ours, expected, strict=True):
        assert torch.equal(bits(mine), bits(true))


def powers(n: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-3, 4, (n,), device="cuda").float())


def rotated(y: torch.Tensor, block: int, d: torch.Tensor | None) -> torch.Tensor:
    return reference.hadamard(y if d is None else y * d.double(), block, block**-0.5).cpu()


def normed(x, w, b, eps, center) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and rstd in float64."""
    y = x.double()
    mean = y.mean(1, keepdim=True) if center else y.new_empty(0)
    y = y - mean if center else y
    rstd = (y.square().mean(1, keepdim=True) + eps).rsqrt()
    y = y * rstd * (1 if w is None else w.double()) + (0 if b is None else b.double())
    return y, mean, rstd


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("k", "block"), ROTATED + PLAIN + ODD)
def test_norm(k, block, center, fmt):
    x = (torch.randn(33, k, device="cuda") * torch.exp(torch.randn(33, 1, device="cuda")) + center).bfloat16()
    w, b, d = 1 + 0.3 * torch.randn(k, device="cuda"), torch.randn(k, device="cuda"), powers(k)
    for weight, bias, col_scale in (
        (w.bfloat16(), b.bfloat16() if center else None, d),
        (w, b if center else None, None),
        (None, None, d),
    ):
        q, scale, mean, rstd = ops.norm_quantize(x, weight, bias, 1e-5, center, fmt, block, col_scale)
        y, exact_mean, exact_rstd = normed(x, weight, bias, 1e-5, center)
        assert_rounds(q, scale, rotated(y, block, col_scale))
        torch.testing.assert_close(rstd.double(), exact_rstd, rtol=2e-6, atol=0)
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("center", [False, True])
def test_norm_of_other_types(center, dtype):
    x, w = torch.randn(20, 256, device="cuda").to(dtype), torch.randn(256, device="cuda").to(dtype)
    q, scale, _, _ = ops.norm_quantize(x, w, w if center else None, 1e-5, center, torch.int8, 64)
    y, _, _ = normed(x, w, w if center else None, 1e-5, center)
    assert_rounds(q, scale, rotated(y, 64, None))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("f", "block"), ROTATED + GATED + PLAIN + ODD)
def test_gated(f, block, activation, fmt):
    both, d = (2 * torch.randn(33, 2 * f, device="cuda")).bfloat16(), powers(f)
    gate, up = both.chunk(2, dim=1)
    act = fused_reference.ACTIVATIONS[activation]
    h = act(gate.double())[0] * up.double()
    for col_scale in (None, d):
        q, scale = ops.gated_quantize(gate, up, activation, fmt, block, col_scale)
        assert_rounds(q, scale, rotated(h, block, col_scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gated_of_other_types(dtype):
    gate, up = torch.randn(2, 20, 256, device="cuda").to(dtype)
    q, scale = ops.gated_quantize(gate, up, "silu", torch.int8, 64)
    assert_rounds(q, scale, rotated(torch.nn.functional.silu(gate.double()) * up.double(), 64, None))


@pytest.mark.parametrize("fmt", [*FORMATS, torch.float8_e5m2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "f"), [(1, 1), (3, 7), (33, 48), (64, 256), (144, 264), (257, 1000), (528, 4096), (48, 14336)]
)
def test_gated_grad(m, f, activation, fmt):
    # 1 + erf cancels where gelu ends, at 1e-8 of the largest gradient, which e5m2 alone can tell from zero.
    size = 1 if activation == "gelu" and fmt is torch.float8_e5m2 else 2
    x = [(size * torch.randn(m, f, device="cuda")).bfloat16() for _ in range(3)]
    s, t, r = (torch.rand(n, device="cuda") + 0.1 for n in (m, f, f))
    value, derivative = fused_reference.ACTIVATIONS[activation](x[1].double())
    dgate, dup = x[0].double() * x[2].double() * derivative, x[0].double() * value
    for columns in ((None, None), (t, r)):
        results = ops.gated_grad_quantize(*x, activation, fmt, s, *columns)
        scaled = [g if c is None else g * c.double() for g, c in zip((dgate, dup), columns, strict=True)]
        exact = (*scaled, (dgate * s.double()[:, None]).t(), (dup * s.double()[:, None]).t())
        for q, scale, y in zip(results[::2], results[1::2], exact, strict=True):
            assert_rounds(q, scale, y.cpu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gated_grad_of_other_types(dtype):
    dh, gate, up = torch.randn(3, 48, 64, device="cuda").to(dtype)
    s = torch.rand(48, device="cuda") + 0.1
    q, scale, *_ = ops.gated_grad_quantize(dh, gate, up, "silu", torch.int8, s)
    _, derivative = fused_reference.ACTIVATIONS["silu"](gate.double())
    assert_rounds(q, scale, (dh.double() * up.double() * derivative).cpu())


def test_views_with_gaps_and_odd_addresses():
    x, w = torch.randn(64, 800, device="cuda").bfloat16(), torch.randn(256, device="cuda")
    s = torch.rand(64, device="cuda")
    for view in (x[:, 8:264], x[:, 3:259], x[::2, :256], x.t()[:256].t(), x[5:, 16:272]):
        dense, other = view.contiguous(), torch.randn(view.shape, device="cuda").bfloat16()
        rows = s[: view.shape[0]]
        aligned = view.data_ptr() % 16 == 0 and view.stride(1) == 1
        for run in (
            lambda v: ops.norm_quantize(v, w, None, 1e-5, False, torch.int8, 256),
            lambda v: ops.gated_quantize(v, other, "silu", torch.int8, 256),  # noqa: B023
            lambda v: ops.gated_grad_quantize(other, v, v, "silu", torch.int8, rows),  # noqa: B023
        ):
            ours, expected = run(view), run(dense)
            for mine, true in zip(ours, expected, strict=True):
                if aligned:
                    assert torch.equal(mine, true)
                else:  # another way to the same values
                    difference = (mine.double() - true.double()).abs()
                    assert (difference <= (1 if mine.dtype is torch.int8 else 1e-4)).all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(shape):
    x, s = torch.empty(shape, device="cuda").bfloat16(), torch.ones(shape[0], device="cuda")
    for run in (
        lambda *a: ops.norm_quantize(a[0], None, None, 1e-5, True, torch.int8),
        lambda *a: ops.gated_quantize(a[0], a[0], "silu", torch.int8),
        lambda *a: ops.gated_grad_quantize(a[0], a[0], a[0], "silu", torch.int8, a[1]),
    ):
        for ours, expected in zip(run(x, s), run(x.cpu(), s.cpu()), strict=True):
            torch.testing.assert_close(ours.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("k", "block"), [(256, 1), (1024, 64), (2048, 2048), (4096, 4096), (12288, 4096), (100, 4)]
)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_nonfinite_values_poison_their_own_row(bad, k, block):
    x, up = torch.randn(2, 300, k, device="cuda").bfloat16()
    s = torch.ones(300, device="cuda")
    runs = (
        lambda: ops.norm_quantize(x, None, None, 1e-5, False, torch.int8, block)[:2],
        lambda: ops.norm_quantize(x, None, None, 1e-5, True, torch.int8, block)[:2],
        lambda: ops.gated_quantize(x, up, "silu", torch.int8, block),
        lambda: ops.gated_grad_quantize(up, x, up, "silu", torch.int8, s)[:2],
    )
    clean = [run() for run in runs]
    x[7, k // 3], x[299, k - 1] = bad, bad
    kept = [row for row in range(300) if row not in (7, 299)]
    for run, (q, scale) in zip(runs, clean, strict=True):
        new_q, new_scale = run()
        assert (~torch.isfinite(new_scale)).nonzero().flatten().tolist() == [7, 299]
        assert torch.equal(new_q[kept], q[kept])
        assert torch.equal(new_scale[kept], scale[kept])


@pytest.mark.parametrize(
    ("k", "block"), [(512, 512), (2048, 2048), (4096, 4096), (11008, 256), (28672, 4096)]
)
def test_rows_do_not_depend_on_their_number_and_repeat(k, block):
    rows = 1500 if k < 10000 else 400
    x, up = torch.randn(2, rows, k, device="cuda").bfloat16()
    w, d = torch.randn(k, device="cuda").bfloat16(), powers(k)
    for run in (
        lambda n: ops.norm_quantize(x[:n], w, None, 1e-5, False, torch.int8, block, d)[:2],
        lambda n: ops.norm_quantize(x[:n], w, w, 1e-5, True, torch.int8, block, d)[:2],
        lambda n: ops.gated_quantize(x[:n], up[:n], "silu", torch.int8, block, d),
    ):
        q, scale = run(rows)
        for n in (rows, 1, 3, rows - 1):
            part, part_scale = run(n)
            assert torch.equal(part, q[:n])
            assert torch.equal(part_scale, scale[:n])


def test_gradients_repeat_and_are_graph_safe():
    x = [torch.randn(1024, 4096, device="cuda").bfloat16() for _ in range(3)]
    s = torch.rand(1024, device="cuda")
    expected = ops.gated_grad_quantize(*x, "silu", torch.float8_e4m3fn, s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.gated_grad_quantize(*x, "silu", torch.float8_e4m3fn, s)
        h = ops.gated_quantize(*x[:2], "silu", torch.float8_e4m3fn, 4096)
        n = ops.norm_quantize(x[0], None, None, 1e-5, False, torch.float8_e4m3fn, 4096)
    for _ in range(3):
        graph.replay()
        assert_same_bits(captured, expected)
    assert_same_bits(h, ops.gated_quantize(*x[:2], "silu", torch.float8_e4m3fn, 4096))
    assert_same_bits(n, ops.norm_quantize(x[0], None, None, 1e-5, False, torch.float8_e4m3fn, 4096))


def test_statistics_serve_the_backward_of_pytorch():
    x, e = (torch.randn(64, 512, device="cuda").bfloat16() for _ in range(2))
    w, b = (torch.randn(512, device="cuda").bfloat16() for _ in range(2))
    aten = torch.ops.aten
    _, _, mean, rstd = ops.norm_quantize(x, w, b, 1e-5, True, torch.int8)
    _, m, r = aten.native_layer_norm(x, [512], w, b, 1e-5)
    ours = aten.native_layer_norm_backward(e, x, [512], mean, rstd, w, b, [True] * 3)
    theirs = aten.native_layer_norm_backward(e, x, [512], m, r, w, b, [True] * 3)
    _, _, _, rstd = ops.norm_quantize(x, w, None, 1e-5, False, torch.int8)
    _, r = aten._fused_rms_norm(x, [512], w, 1e-5)
    ours = (*ours, *aten._fused_rms_norm_backward(e, x, [512], rstd, w, [True] * 2))
    theirs = (*theirs, *aten._fused_rms_norm_backward(e, x, [512], r, w, [True] * 2))
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=0.02, atol=0.02)


def test_opcheck():
    x, up, dh = (torch.randn(48, 64, device="cuda").bfloat16() for _ in range(3))
    w, s = torch.rand(64, device="cuda"), torch.rand(48, device="cuda")
    namespace = torch.ops.halo_train
    torch.library.opcheck(namespace.norm_quantize, (x, w, None, 1e-6, False, torch.int8, 64, w))
    torch.library.opcheck(namespace.norm_quantize, (x, w, w, 1e-6, True, torch.float8_e4m3fn, 1, None))
    torch.library.opcheck(namespace.gated_quantize, (x, up, "silu", torch.int8, 64, w))
    torch.library.opcheck(namespace.gated_grad_quantize, (dh, x, up, "gelu", torch.int8, s, w, None))


def test_more_than_2_to_the_31_elements():
    gate = torch.randn(131075, 16384, dtype=torch.bfloat16, device="cuda")
    q, scale = ops.gated_quantize(gate, gate, "silu", torch.int8, 16384)
    last, last_scale = ops.gated_quantize(gate[-3:], gate[-3:], "silu", torch.int8, 16384)
    assert torch.equal(q[-3:], last)
    assert torch.equal(scale[-3:], last_scale)
    s = torch.rand(131075, device="cuda")
    forms = ops.gated_grad_quantize(gate, gate, gate, "silu", torch.int8, s)
    last_forms = ops.gated_grad_quantize(gate[-3:], gate[-3:], gate[-3:], "silu", torch.int8, s[-3:])
    for o in range(4):
        assert torch.equal(forms[o][-3:], last_forms[o])
    columns = forms[4].float() * forms[5][:, None]
    rows = last_forms[0].float() * last_forms[1][:, None] * s[-3:, None]
    torch.testing.assert_close(columns[:, -3:].t(), rows, rtol=0, atol=0.02 * forms[5].max().item() * 127)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("m", "k"),
    [
        (1, 16),
        (7, 40),
        (300, 1000),
        (16384, 4096),
        (513, 5120),
        (2000, 8192),
        (777, 16384),
        (33, 20000),
        (0, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_backward(dtype, m, k, count):
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    dys = [torch.randn(m, k + 8, device="cuda").bfloat16()[:, :k] for _ in range(count)]
    w = torch.randn(k, device="cuda", dtype=dtype) if count != 2 else None
    rstd = (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    dx, dw = ops.rms_norm_backward(dys, x, w, rstd)
    wide = [None if t is None else t.double() for t in (x, w, rstd)]
    exact = fused_reference.rms_norm_backward([dy.double() for dy in dys], *wide)
    tolerance = {torch.bfloat16: (8e-3, 1e-3), torch.float32: (1e-5, 1e-5)}[dtype]
    torch.testing.assert_close(dx.double(), exact[0], rtol=tolerance[0], atol=tolerance[1])
    torch.testing.assert_close(dw.double(), exact[1], rtol=1e-4, atol=1e-4 * max(m, 1) ** 0.5)


def test_rms_norm_backward_is_compiled_and_deterministic():
    x, w = torch.randn(500, 256, device="cuda").bfloat16(), torch.randn(256, device="cuda").bfloat16()
    dys = [torch.randn_like(x) for _ in range(3)]
    rstd = (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    results = [ops.rms_norm_backward(dys, x, w, rstd) for _ in range(2)]
    results.append(torch.compile(ops.rms_norm_backward, fullgraph=True)(dys, x, w, rstd))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
