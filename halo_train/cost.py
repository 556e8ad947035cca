"""Whether 8 bits pay: a model of the time of a linear layer, forward and backward, for the GPUs that were measured.

The larger of two times counts: that of the GPU (three products and the bytes that equalising, rotating, rounding and
transposing move) and that of the host, which launches the kernels one by one. docs/numerics.md, section 7, shows the model
beside measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .config import Format, HaloConfig


class Rates(NamedTuple):
    """What a GPU and its host reach on layers of the sizes of a transformer."""

    bf16: float
    """FLOP/s of a bfloat16 product."""
    float8: float
    int8: float
    bandwidth: float
    """Bytes a second, read and written."""
    host_bf16: float
    """Seconds that the host takes for forward and backward of one nn.Linear in eager mode."""
    host_float8: float
    """The same of a HaloLinear in float8."""
    host_int8: float


H200 = Rates(657e12, 1310e12, 1465e12, 3.0e12, 100e-6, 234e-6, 287e-6)
"""With torch 2.11 (benchmarks/results/, bench_linear); the host's of 8 bits: a layer of 4096 x 4096 at 2048 tokens, which takes its GPU
nearly as long."""

_RATES = {(9, 0): H200}
"""By compute capability."""


def measured_rates(device: torch.device) -> Rates | None:
    """Of the GPU, or None for a device that was not measured."""
    return _RATES.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def predicted_speedup(tokens: int, shape: tuple[int, int], config: HaloConfig, rates: Rates) -> float:
    """Time of nn.Linear in bfloat16 over that of the recipe, forward and backward in eager mode.

    Args:
        tokens: M, that the layer sees at once.
        shape: (out_features, in_features).
    """
    n, k = shape
    flops = 6.0 * tokens * n * k
    bf16 = max(flops / rates.bf16, rates.host_bf16)
    if config.format is Format.HIGH_PRECISION:
        return 1.0
    x, w, e = tokens * k, n * k, tokens * n
    # X, W: read, written in 8 bits, transposed. E: read twice, in blocks once, written in both forms. dX, dW: rotated back, read and
    # written; or W is read twice, in tiles once, and written once more instead of being transposed, and dX is left alone; or, with
    # tiles and where that is less, X is read once more instead of being transposed, and dW is left alone.
    undone = 4 * w if config.rotate_k else 0
    undone = min(undone, x) if config.allows_blocks else undone
    moved = 5 * (x + w) + (4 if config.allows_blocks else 6) * e + undone
    if config.requantize_w_dgrad:
        moved += (1 if config.allows_blocks else 3) * w
    elif config.rotate_k:
        moved += 4 * x
    rate, host = (
        (rates.int8, rates.host_int8) if config.format is Format.INT8 else (rates.float8, rates.host_float8)
    )
    return bf16 / max(flops / rate + moved / rates.bandwidth, host)
