"""What a rounded result is held to: the codes of float64 values, but for near-ties."""

from __future__ import annotations

import torch

from halo_train.ops import reference


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(t.shape or (1,)).view(torch.uint8)


def assert_nearly_same_codes(q: torch.Tensor, expected: torch.Tensor, share: float = 1e-3) -> None:
    """float32 sums decide near-ties differently: the next code, rarely."""
    steps, least = (4, 2.0**-16) if q.dtype is torch.float8_e5m2 else (8, 2.0**-9)
    step = 1.0 if q.dtype is torch.int8 else (expected.double().abs() / steps).clamp(min=least)
    off = (q.cpu().double() - expected.double()).abs()
    assert (off <= 1.01 * step).all()
    assert (off > 0).double().sum() <= max(share * off.numel(), 4)


def assert_rounds(q: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor) -> None:
    """q and scale are those of the float64 values. Values rounded to bfloat16 in between differ in 2 to 4 of 100."""
    expected, expected_scale = reference.quantize_rows(exact, q.dtype)
    torch.testing.assert_close(scale.cpu().double(), expected_scale, rtol=1e-5, atol=0)
    assert_nearly_same_codes(q, expected, share=5e-3)
