"""What gradients rounded with scales for blocks must satisfy, whoever rounded them."""

from __future__ import annotations

import torch
from torch import Tensor

from halo_train.ops.reference import SCALE_BLOCK


def values_of(q: Tensor, scale: Tensor) -> Tensor:
    """Codes [R, C] times their scales [blocks, R], in float64."""
    return q.double() * scale.double().t().repeat_interleave(SCALE_BLOCK, dim=1)[:, : q.shape[1]]


def assert_rounds_blocks(q: Tensor, scale: Tensor, exact: Tensor) -> None:
    """q and scale are exact, float64, through bfloat16 and rounded once to e4m3, under the smallest powers of 16 that hold it."""
    rows, columns = exact.shape
    assert (q.dtype, q.shape) == (torch.float8_e4m3fn, exact.shape)
    assert q.is_contiguous()
    assert scale.is_contiguous()
    assert (scale.dtype, scale.shape) == (torch.float32, (-(-columns // SCALE_BLOCK), rows))
    mantissa, exponent = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert ((exponent - 1) % 4 == 0).all()
    padded = torch.nn.functional.pad(exact, (0, -columns % SCALE_BLOCK)).unflatten(1, (-1, SCALE_BLOCK))
    amax = padded.abs().amax(2).t()
    zeros = amax == 0
    assert (scale[zeros] == 1).all()
    # A largest magnitude near a power's limit may go either way: it has been rounded, as have its factors.
    ratio = amax[~zeros] / (448 * scale[~zeros].double())
    assert (ratio <= 1.01).all()
    assert ((ratio >= 0.99 / 16) | (exponent[~zeros] == -59)).all()
    steps = scale.double().t().repeat_interleave(SCALE_BLOCK, dim=1)[:, :columns]
    error = (values_of(q, scale) - exact).abs()
    assert (error <= (2**-4 + 2**-8) * exact.abs() + 2**-10 * 1.01 * steps).all()
