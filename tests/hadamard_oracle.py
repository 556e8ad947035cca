"""Hadamard transforms in float64, and what a result rounded once may differ from them; for tests on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def expected(
    x: Tensor, block: int, scale: float, signs: Tensor | None = None, matrix: Tensor | None = None
) -> Tensor:
    """Unrounded float64 result; butterflies from the top bit down, the reverse of the kernel's order."""
    y = x.double() * (1.0 if signs is None else signs.double())
    if matrix is not None:
        block //= matrix.shape[0]
        y = matrix.double() @ y.reshape(-1, matrix.shape[0], block)
    half = block // 2
    while half:
        y = y.reshape(-1, 2, half)
        y = torch.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), dim=1)
        half //= 2
    return y.reshape(x.shape) * scale


def assert_rounded_once(
    y: Tensor, exact: Tensor, block: int, factors: Tensor | None = None, mismatches: float = 1e-3
) -> None:
    """At most one unit in the last place plus 1e-6 of the block's RMS; 16-bit results equal the rounded exact ones but for
    that share of the elements.

    The RMS is that of ``exact``, before the factors of the columns.
    """
    assert y.shape == exact.shape
    assert y.is_contiguous()
    rms = (
        exact.reshape(-1, block)
        .square()
        .mean(dim=1, keepdim=True)
        .sqrt()
        .expand(-1, block)
        .reshape(exact.shape)
    )
    if factors is not None:
        rms = rms * factors.double().abs()
        exact = exact * factors.double()
    smallest = torch.finfo(y.dtype).tiny
    exponent = torch.frexp(exact.abs().clamp(min=smallest)).exponent - 1
    ulp = torch.ldexp(torch.ones_like(exact), exponent - MANTISSA[y.dtype])
    excess = (y.double() - exact).abs() - ulp - 1e-6 * rms
    worst = int(excess.argmax())
    assert excess.max() <= 0, f"element {worst}: got {y.flatten()[worst]}, exact {exact.flatten()[worst]}"
    if y.dtype in HALF:
        wrong = int((y != exact.to(y.dtype)).sum())
        # Below 16000 elements, of which some may be copies, the share is a handful and says nothing.
        assert wrong <= mismatches * max(y.numel(), 16000), (
            f"{wrong} of {y.numel()} elements are not correctly rounded"
        )
