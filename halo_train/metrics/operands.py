"""Which rows and columns are sampled, and what they are when the whole tensor is rounded."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Format
from ..gemm import MULTIPLE, matmul
from ..hadamard import hadamard_transform, largest_block
from ..ops import SCALE_BLOCK
from ..quantize import Quantized, quantize, quantize_grad_blocks
from .sample import SampleSize


class Block(NamedTuple):
    """Indices of what is sampled of a layer's axes."""

    tokens: Tensor
    outputs: Tensor
    inputs: Tensor


class Draws:
    """The tokens, output and input features that one step measures: one draw for every length of an axis.

    Args:
        generator: on the device of the layers.
    """

    def __init__(self, size: SampleSize, generator: torch.Generator) -> None:
        self._sizes = {"tokens": size.tokens, "outputs": size.out_features, "inputs": size.in_features}
        self._generator = generator
        self._drawn: dict[tuple[str, int], Tensor] = {}
        self._rotations: dict[tuple[int, torch.dtype], tuple[Quantized, Tensor]] = {}

    def take(self, axis: str, n: int) -> Tensor:
        """Different indices below n, all of them where the sample is not smaller.

        Args:
            axis: ``"tokens"``, ``"outputs"`` or ``"inputs"``.
        """
        if (axis, n) not in self._drawn:
            device, size = self._generator.device, self._sizes[axis]
            order = torch.rand(n, generator=self._generator, device=device).argsort() if size < n else None
            self._drawn[axis, n] = torch.arange(n, device=device) if order is None else order[:size]
        return self._drawn[axis, n]

    def block(self, tokens: int, outputs: int, inputs: int) -> Block:
        """The sample of a layer with axes of these lengths."""
        return Block(self.take("tokens", tokens), self.take("outputs", outputs), self.take("inputs", inputs))

    def rotation(self, n: int, dtype: torch.dtype) -> tuple[Quantized, Tensor]:
        """Columns of the rotation of n input features, those drawn, and the 1 that raw data is scaled by to meet them.

        Returns:
            data [C', K'] of +1 and -1 in an 8-bit ``dtype``, one column a row, then rows of zeros; C' and K' are multiples
            of 16. Both scales are [], float32.
        """
        if (n, dtype) not in self._rotations:
            chosen = self.take("inputs", n)
            count = len(chosen)
            unit = torch.zeros(
                count + -count % MULTIPLE, n + -n % MULTIPLE, dtype=torch.float32, device=chosen.device
            )
            unit[:count].scatter_(1, chosen[:, None], 1.0)
            # +1 and -1 are exact in every 8-bit dtype, and e5m2 data multiplies e4m3 only.
            stored = torch.float8_e4m3fn if dtype == torch.float8_e5m2 else dtype
            signs, one = hadamard_transform(unit, scale=1.0).to(stored), unit.new_ones(())
            self._rotations[n, dtype] = Quantized(signs, one / math.sqrt(largest_block(unit.shape[1]))), one
        return self._rotations[n, dtype]


def operand_columns(
    q: Quantized, undo: Tensor | None, draws: Draws, features: int, out: Tensor, *, rotated: bool
) -> None:
    """The drawn input features of what the data of a rounded operand stands for, rotation and equalisation undone.

    A float8 GEMM sums in fewer bits than float32; 20 dB below what the rounding to float8 costs (numerics.md, section 5).

    Args:
        q: data [R', K'], X or W padded as its layer rounds it; its scale is not applied.
        undo: what takes the equalisation back, [K], or None.
        out: [R, C], receives the values.
    """
    chosen = draws.take("inputs", features)
    if rotated:
        columns, one = draws.rotation(features, q.data.dtype)
        values = matmul(Quantized(q.data, one), columns, q.scale.dtype)[: len(out), : out.shape[1]]
    else:
        values = bytes_of(q.data)[: len(out), chosen].view(q.data.dtype).to(q.scale.dtype)
    if undo is None:
        out.copy_(values)
    else:
        torch.mul(values, undo[chosen], out=out)


def gather_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """The given rows of x, into ``out`` of the same or a wider dtype."""
    if x.dtype == out.dtype:
        torch.index_select(x, 0, rows, out=out)
    else:
        out.copy_(x[rows])


def take_rows(q: Quantized, rows: Tensor) -> Quantized:
    """The rows of a rounded matrix, with one scale each, or of one with scales for tiles with a scale for each block, [blocks, R]."""
    # Not every device can index float8.
    data = bytes_of(q.data)[rows].view(q.data.dtype)
    if q.scale.dim() == 2:
        return Quantized(data, q.scale[:, rows // SCALE_BLOCK])
    return Quantized(data, q.scale[rows] if q.scale.dim() else q.scale.expand(len(data)))


def below(upper: Quantized, lower: Quantized) -> Quantized:
    """Rounded matrices with row scales, one below the other."""
    data = torch.cat([bytes_of(upper.data), bytes_of(lower.data)]).view(upper.data.dtype)
    return Quantized(data, torch.cat([upper.scale, lower.scale]))


def of_rows(scale: Tensor, rows: int) -> Tensor:
    """[rows], without the scales of padded rows."""
    return scale[:rows] if scale.dim() else scale.expand(rows)


def round_parts(rows: Tensor, amax: Tensor, fmt: Format) -> Quantized:
    """Parts of rows whose largest magnitudes are known, rounded as in the whole rows.

    Args:
        rows: [..., C]. amax: [...] in whatever dtype, exact: each is the magnitude of an element.
    """
    # Columns of amax beside them decide the scales; as many as leave rows aligned that were.
    known = amax.to(rows.dtype)[..., None].expand(*amax.shape, MULTIPLE)
    q = quantize(torch.cat([rows, known], -1), fmt)
    return Quantized(q.data[..., : rows.shape[-1]], q.scale)


def round_blocks(rows: Tensor, factors: Tensor | None, fmt: Format) -> Quantized:
    """Rows of gradients times factors of their columns, with a scale for each row and block, as in the whole gradient.

    Args:
        rows: [L, R, Q], of E or of its transpose. factors: [L, Q] or None.

    Returns:
        data [L, R, Q], scale [L, blocks, R].
    """
    ones, parts = rows.new_ones(rows.shape[1], dtype=torch.float32), []
    for i, e in enumerate(rows):
        q, _, _ = quantize_grad_blocks(e, fmt, None if factors is None else factors[i], ones)
        parts.append(q)
    data = torch.stack([bytes_of(q.data) for q in parts]).view(parts[0].data.dtype)
    return Quantized(data, torch.stack([q.scale for q in parts]))


def blocks_of(t: Tensor) -> Tensor:
    """Matrices [B, R, Q] cut up into their blocks of columns, [B blocks, R, SCALE_BLOCK], the last filled up with zeros."""
    stored = F.pad(bytes_of(t), (0, -t.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    return stored.transpose(1, 2).flatten(0, 1).view(t.dtype)


def scale_of_amax(amax: Tensor, dtype: torch.dtype, fmt: Format) -> Tensor:
    """Scales [R] of rows of ``dtype`` whose largest magnitudes are amax [R]."""
    return quantize(amax.to(dtype)[:, None], fmt).scale


def values_of(q: Quantized) -> Tensor:
    """What rounded rows with a scale each, or one for each block, [L, blocks, R], stand for, float64."""
    scale = q.scale[..., None]
    if has_blocks(q):
        scale = q.scale.mT.repeat_interleave(SCALE_BLOCK, -1)[..., : q.data.shape[-1]]
    return q.data.to(torch.float64, copy=True).mul_(scale)


def has_blocks(q: Quantized) -> bool:
    """Whether rows [L, R, Q] have a scale for each block."""
    return q.scale.dim() == q.data.dim()


def bytes_of(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.element_size() == 1 else data
