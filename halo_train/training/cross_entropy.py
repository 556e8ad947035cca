"""Cross-entropy of a block of logits and its slope, on a GPU in place by one Triton kernel.

In PyTorch's operators the logits pass through memory as float32 some ten times. The kernel reads them twice, the second time
mostly from the L2 cache, and writes the slope over them. The idea, a slope formed with the loss and stored over the logits, is
that of Liger-Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

tl: Any = None
"""triton.language once the kernel is first needed: recipes on a CPU do not load Triton."""

_BLOCK = 8192
"""Logits of a row that are in registers at a time."""


class LogitMap(NamedTuple):
    """What a model does with the products of its output layer: z -> cap tanh(scale z / cap); scale z without a cap."""

    scale: float = 1.0
    """E.g. Granite's logits_scaling, Cohere's logit_scale."""
    cap: float | None = None
    """E.g. Gemma 2's final_logit_softcapping."""

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def loss_and_slope(
    z: Tensor, targets: Tensor, logit_map: LogitMap, needs_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum over the rows of the cross-entropy of ``logit_map(z)``, computed in float32 or wider, and its derivative in z.

    Args:
        z: products of the output layer, [M, V]. It may be overwritten.
        targets: [M], int64 in [0, V).

    Returns:
        A scalar, float32 or wider; [M, V] in the dtype of z, or None if it is not needed.
    """
    if runs_kernel(z):
        losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        with torch.cuda.device(z.device):
            launch(z, targets, losses, logit_map, needs_slope)
        return losses.sum(), z if needs_slope else None
    z.requires_grad_(needs_slope)
    with torch.set_grad_enabled(needs_slope):
        logits = logit_map(z.to(torch.promote_types(z.dtype, torch.float32)))
        loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, z)[0] if needs_slope else None


def runs_kernel(z: Tensor) -> bool:
    """Whether the kernel takes tensors of this device and dtype; others take PyTorch's operators."""
    return z.is_cuda and z.dtype in (torch.bfloat16, torch.float16, torch.float32) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def launch(z: Tensor, targets: Tensor, losses: Tensor, logit_map: LogitMap, needs_slope: bool) -> None:
    """Writes the losses [M] of the rows of z [M, V] and, where needed, the slopes over z. The rows of z are contiguous."""
    rows, size = z.shape
    _kernel()[(rows,)](
        z,
        targets,
        losses,
        size,
        z.stride(0),
        logit_map.scale,
        logit_map.cap or 1.0,
        CAPPED=logit_map.cap is not None,
        SLOPE=needs_slope,
        BLOCK=min(_BLOCK, 1 << (size - 1).bit_length()),
        num_warps=16,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language

    global tl
    tl = triton.language
    return triton.jit(_cross_entropy_kernel)


def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    z,
    targets,
    losses,
    size,
    stride,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    # Sum of exp(x - top) over the blocks so far, top the largest logit so far.
    top = -float("inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(z + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
        if CAPPED:
            x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    normaliser = top + tl.log(total)
    target = tl.load(targets + row)
    chosen = tl.load(z + target).to(tl.float32) * scale
    if CAPPED:
        chosen = cap * (2 * tl.sigmoid(2 * chosen / cap) - 1)
    tl.store(losses + row, normaliser - chosen)
    if SLOPE:
        tl.debug_barrier()  # another thread may still read the logit of the target, which the next lines overwrite
        for start in range(0, size, BLOCK):
            inside = start + columns < size
            x = tl.load(z + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
            slope = 1.0
            if CAPPED:
                bent = 2 * tl.sigmoid(2 * x / cap) - 1
                x = cap * bent
                slope = 1 - bent * bent
            slope = (tl.exp(x - normaliser) - (start + columns == target)) * slope * scale
            tl.store(z + start + columns, slope.to(z.dtype.element_ty), mask=inside)
