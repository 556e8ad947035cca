"""What the test suites of HadaCore, Dao-AILab's fast-hadamard-transform and vLLM cover, asked of our transform.

Their calls are thin shims here: ``fast_hadamard_transform(x, scale)``, unnormalised, lengths padded with zeros to a power of two,
and ``hadacore(x, inplace)``, orthonormal. The bounds are theirs; ``test_hadamard*.py`` holds the transform to tighter ones.
"""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from halo_train import hadamard_transform, ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF = [torch.float16, torch.bfloat16]


def fast_hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    n = x.shape[-1]
    power = 1 << (n - 1).bit_length()
    return hadamard_transform(F.pad(x, (0, power - n)), block=power, scale=scale)[..., :n]


def hadacore(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    n = x.shape[-1]
    if not inplace:
        return hadamard_transform(x, block=n)
    ops.hadamard_(x, n, n**-0.5)
    return x


def matrix(n: int, device: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    small = min(n, 512)  # scipy's matrix of order 32768 would take 8 GB and a minute
    h = torch.from_numpy(scipy.linalg.hadamard(small)).to(device, dtype)
    two = torch.tensor([[1, 1], [1, -1]], device=device, dtype=dtype)
    while h.shape[0] < n:
        h = torch.kron(two, h)
    return h


def largest(device: str) -> int:
    """A dense product on a CPU ends earlier."""
    return 32768 if device == "cuda" else 2048


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 3e-3), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize("n", [*(2**k for k in range(16)), 137])
def test_dao_forward_and_backward(n, dtype, atol, device):
    """At most twice the error of PyTorch's own product in the same dtype, plus a bound; both directions."""
    if n > largest(device):
        pytest.skip("a dense product of this size takes a GPU")
    torch.manual_seed(0)
    power = 1 << (n - 1).bit_length()
    x = torch.randn(15, n, device=device, dtype=torch.float32).to(dtype)
    grad = torch.randn(15, n, device=device, dtype=torch.float32).to(dtype)

    def dense(t, h):
        return (F.pad(t, (0, power - n)) @ h)[..., :n] / n**0.5

    ours = x.clone().requires_grad_()
    y = fast_hadamard_transform(ours, scale=n**-0.5)
    (dx,) = torch.autograd.grad(y, ours, grad)
    h = matrix(power, device)
    exact, exact_dx = dense(x.double(), h), dense(grad.double(), h)
    for mine, true, source in ((y, exact, x), (dx, exact_dx, grad)):
        theirs = (dense(source, h.to(dtype)).double() - true).abs().max()
        assert mine.dtype == dtype
        assert (mine.double() - true).abs().max() < 2 * theirs + atol


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("n", [2**k for k in range(1, 16)])
def test_hadacore_in_place_and_out_of_place(n, dtype, atol, device):
    """Totals from 2^9 elements; against the product with the matrix."""
    if n > largest(device):
        pytest.skip("a dense product of this size takes a GPU")
    torch.manual_seed(0)
    h = matrix(n, device, torch.float32) / n**0.5
    for log in range(9, 26 if device == "cuda" else 16, 4):
        if 2**log < n:
            continue
        x = torch.randn(2**log // n, n, device=device).to(dtype)
        expected = (x.float() @ h).to(dtype)
        torch.testing.assert_close(hadacore(x), expected, atol=atol, rtol=atol)
        assert hadacore(x, inplace=True) is x
        torch.testing.assert_close(x, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [2**k for k in range(10)])
def test_vllm_identity_and_round_trip(n, device):
    """The identity gives the matrix exactly; the transform of the transform is the input."""
    x = torch.eye(n, device=device, dtype=torch.bfloat16)
    y = fast_hadamard_transform(x)
    assert torch.equal(y, matrix(n, device, torch.bfloat16))
    back = hadacore(hadacore(x))
    torch.testing.assert_close(back, x, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [32, 64, 128])
def test_vllm_odd_numbers_of_rows(n):
    """The same rows from run to run and for every count of them (vLLM issue 57014)."""
    torch.manual_seed(0)
    x = torch.randn(65540, n, device="cuda", dtype=torch.bfloat16)
    y = hadacore(x)
    for rows in (*range(1, 41), 8193, 20004, 65540):
        assert torch.equal(hadacore(x[:rows]), y[:rows])
        assert torch.equal(hadacore(x[:rows].clone(), inplace=True), y[:rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [12, 20, 28, 40])
def test_dao_sizes_that_are_no_power_of_two(m, device):
    """Orthogonal, and a gradient that is the transpose: the peer's own 20N, 28N and 40N take the matrix for symmetric."""
    n = 64 * m
    x = torch.randn(3, n, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(3, n, device=device, dtype=torch.bfloat16)
    y = hadamard_transform(x, block=n)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y.double().norm(dim=1), x.double().norm(dim=1), rtol=1e-2, atol=0)
    # <H x, g> = <x, H^T g>
    left, right = (y.double() * grad.double()).sum(), (x.double() * dx.double()).sum()
    assert abs(left - right) < 1e-2 * y.double().norm() * grad.double().norm()
