"""Norms and gated activations fused with rounding: against PyTorch's own norms, activations and autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantize_oracle import assert_rounds

from halo_train import ops
from halo_train.ops import reference

FORMATS = [torch.float8_e4m3fn, torch.int8]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def factors(n: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-3, 4, (n,)).float())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize(
    ("center", "weight", "bias"), [(0, 0, 0), (0, 1, 0), (1, 1, 1), (1, 1, 0), (1, 0, 0)]
)
def test_norm_quantize(center, weight, bias, block, dtype):
    x = (3 * torch.randn(33, 96) + 1).bfloat16()
    w = (torch.randn(96) + 1).bfloat16() if weight else None
    b = torch.randn(96) if bias else None
    d = factors(96)
    q, scale, mean, rstd = ops.norm_quantize(x, w, b, 1e-5, bool(center), dtype, block, d)
    wide = [None if v is None else v.double() for v in (x, w, b)]
    if center:
        y = F.layer_norm(wide[0], (96,), wide[1], wide[2], 1e-5)
    else:
        y = F.rms_norm(wide[0], (96,), wide[1], 1e-5)
    assert_rounds(q, scale, reference.hadamard(y * d.double(), block, block**-0.5))
    _, expected_mean, expected_rstd = torch.native_layer_norm(wide[0], (96,), None, None, 1e-5)
    if center:
        torch.testing.assert_close(mean.double(), expected_mean)
        torch.testing.assert_close(rstd.double(), expected_rstd)
    else:
        assert mean.numel() == 0
        torch.testing.assert_close(rstd.double(), (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt())


@pytest.mark.parametrize("center", [False, True])
def test_statistics_are_what_the_backward_of_pytorch_takes(center):
    x, w, b, e = torch.randn(5, 16), torch.randn(16), torch.randn(16), torch.randn(5, 16)
    _, _, mean, rstd = ops.norm_quantize(x, w, b if center else None, 1e-5, center, torch.int8)
    for v in (x, w, b):
        v.requires_grad_()
    if center:
        F.layer_norm(x, (16,), w, b, 1e-5).backward(e)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(e, x, [16], mean, rstd, w, b, [True] * 3)
        torch.testing.assert_close(db, b.grad)
    else:
        F.rms_norm(x, (16,), w, 1e-5).backward(e)
        # _fused_rms_norm_backward has no CPU kernel: its equation, and the shape of what it takes.
        _, expected = torch.ops.aten._fused_rms_norm(x, [16], w, 1e-5)
        assert rstd.shape == expected.shape
        assert rstd.dtype == expected.dtype
        unit = x.detach() * rstd
        dx = rstd * (e * w - unit * (e * w * unit).mean(1, keepdim=True))
        dw = (e * unit).sum(0)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dw, w.grad)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_quantize(activation, block, dtype):
    both, d = (2 * torch.randn(33, 192)).bfloat16(), factors(96)
    gate, up = both.chunk(2, dim=1)
    q, scale = ops.gated_quantize(gate, up, activation, dtype, block, d)
    h = ACTIVATIONS[activation](gate.double()) * up.double()
    assert_rounds(q, scale, reference.hadamard(h * d.double(), block, block**-0.5))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_grad_quantize(activation, scaled, dtype):
    dh, gate, up = ((2 * torch.randn(40, 24)).bfloat16() for _ in range(3))
    s, t, r = torch.rand(40) + 0.1, torch.rand(24) + 0.1, torch.rand(24) + 0.1
    columns = (t, r) if scaled else (None, None)
    results = ops.gated_grad_quantize(dh, gate, up, activation, dtype, s, *columns)
    g, u = (v.double().requires_grad_() for v in (gate, up))
    (ACTIVATIONS[activation](g) * u).backward(dh.double())
    t, r = (t, r) if scaled else (torch.ones(24), torch.ones(24))
    exact = (g.grad * t, u.grad * r, (g.grad * s[:, None]).t(), (u.grad * s[:, None]).t())
    for q, scale, y in zip(results[::2], results[1::2], exact, strict=True):
        assert q.is_contiguous()
        assert_rounds(q, scale, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    gate = torch.tensor([[-1e4, -100.0, -30.0, -10.0, 10.0, 30.0, 100.0, 1e4]])
    exact = gate.double().requires_grad_()
    value = ACTIVATIONS[activation](exact)
    value.sum().backward()
    ones = torch.ones_like(gate)
    q, scale = ops.gated_quantize(gate, ones, activation, torch.float32)
    torch.testing.assert_close((q * scale).double(), value.detach(), rtol=1e-6, atol=1e-6)
    q, scale, *_ = ops.gated_grad_quantize(ones, gate, ones, activation, torch.float32, torch.ones(1))
    torch.testing.assert_close((q * scale).double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_nonfinite_values_are_seen_in_their_row():
    x = torch.randn(4, 16)
    x[1, 3], x[2, 4] = float("inf"), float("nan")
    ones = torch.ones(4, 16)
    for _, scale, *_ in (
        ops.norm_quantize(x, None, None, 1e-5, False, torch.int8),
        ops.norm_quantize(x, None, None, 1e-5, True, torch.int8),
        ops.gated_quantize(x, ones, "silu", torch.int8),
        ops.gated_quantize(ones, x, "silu", torch.int8),
        ops.gated_grad_quantize(x, ones, ones, "silu", torch.int8, torch.ones(4)),
    ):
        assert torch.isfinite(scale).tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_empty(shape):
    x = torch.empty(shape)
    q, scale, mean, rstd = ops.norm_quantize(x, None, None, 1e-5, True, torch.int8)
    assert (q.shape, scale.shape) == (shape, shape[:1])
    assert mean.shape == rstd.shape == (shape[0], 1)
    assert ops.gated_quantize(x, x, "silu", torch.int8)[0].shape == shape
    forms = ops.gated_grad_quantize(x, x, x, "silu", torch.int8, torch.ones(shape[0]))
    assert [f.shape for f in forms[::2]] == [shape, shape, shape[::-1], shape[::-1]]


X, W = torch.ones(2, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.norm_quantize(X[0], W, None, 1e-5, False, torch.int8), r"matrix \[rows, columns\]"),
        (lambda: ops.norm_quantize(X, W[:5], None, 1e-5, False, torch.int8), r"weight .*\(6,\).*\(5,\)"),
        (lambda: ops.norm_quantize(X, W, W, 1e-5, False, torch.int8), "bias must be None.*center=True"),
        (lambda: ops.norm_quantize(X, W, None, -1.0, True, torch.int8), "eps must be at least 0; got -1.0"),
        (lambda: ops.norm_quantize(X, W, None, 1e-5, False, torch.int8, 4), "axis of length 6; got 4"),
        (
            lambda: ops.gated_quantize(X, X[:, :5], "silu", torch.int8),
            r"up must have shape \(2, 6\).*\(2, 5\)",
        ),
        (lambda: ops.gated_quantize(X, X.double(), "silu", torch.int8), "up must have .*got .*float64"),
        (lambda: ops.gated_quantize(X, X, "relu", torch.int8), "one of silu, gelu, gelu_tanh; got 'relu'"),
        (lambda: ops.gated_grad_quantize(X, X[:1], X, "silu", torch.int8, W[:2]), r"gate must have shape"),
        (lambda: ops.gated_grad_quantize(X, X, X, "silu", torch.int8, W), r"row_scale .*\(2,\).*\(6,\)"),
        (
            lambda: ops.gated_grad_quantize(X, X, X, "silu", torch.int8, W[:2], None, W[:2]),
            r"up_col_scale .*\(6,\).*\(2,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def fused_cases(device: str) -> dict[str, tuple]:
    x, up, dh = (torch.randn(48, 64, device=device).bfloat16() for _ in range(3))
    w, s = torch.rand(64, device=device), torch.rand(48, device=device)
    return {
        "norm_quantize": (x, w.bfloat16(), None, 1e-6, False, torch.int8, 64, w),
        "norm_quantize, centred": (x, w, w, 1e-6, True, torch.float8_e4m3fn, 1, None),
        "gated_quantize": (x, up, "silu", torch.int8, 64, w),
        "gated_grad_quantize": (dh, x, up, "gelu_tanh", torch.float8_e4m3fn, s, w, None),
    }


@pytest.mark.parametrize("case", fused_cases("cpu"))
def test_opcheck(case):
    torch.library.opcheck(getattr(torch.ops.halo_train, case.split(",")[0]), fused_cases("cpu")[case])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rms_norm_backward(count, weighted):
    x, w = torch.randn(7, 40, dtype=torch.float64, requires_grad=True), torch.randn(40, dtype=torch.float64)
    w = w.requires_grad_() if weighted else None
    dys = [torch.randn(7, 40, dtype=torch.float64) for _ in range(count)]
    F.rms_norm(x, (40,), w, 1e-5).backward(sum(dys))
    rstd = (x.detach().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    dx, dw = ops.rms_norm_backward(dys, x.detach(), None if w is None else w.detach(), rstd)
    torch.testing.assert_close(dx, x.grad)
    if w is not None:
        torch.testing.assert_close(dw, w.grad)


def test_rms_norm_backward_rounds_once_and_checks_its_input():
    x, dys = torch.randn(9, 16).bfloat16(), [torch.randn(9, 16).bfloat16() for _ in range(3)]
    rstd = (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    exact, _ = ops.rms_norm_backward([dy.double() for dy in dys], x.double(), None, rstd.double())
    dx, dw = ops.rms_norm_backward(dys, x, None, rstd)
    assert dx.dtype == torch.bfloat16
    assert dw.dtype == torch.float32
    assert torch.equal(dx, exact.bfloat16())
    for bad in ([], [dys[0], dys[1][:5]]):
        with pytest.raises(ValueError, match=r"dys must be one or more matrices of shape \(9, 16\)"):
            ops.rms_norm_backward(bad, x, None, rstd)
    with pytest.raises(ValueError, match=r"rstd must have shape \(9, 1\)"):
        ops.rms_norm_backward(dys, x, None, rstd[:, 0])
