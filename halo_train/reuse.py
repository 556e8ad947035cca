"""Small tensors that are made once and used in later calls: when that is allowed, and the vectors that are kept so."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .quantize import Equalizer


def may_keep(*tensors: Tensor) -> bool:
    """Whether what is made of these tensors now may be used again in a later call.

    Not while something compiles or captures, which would use it for ever and, in a CUDA graph, from memory of the graph.
    Not under a dispatch mode: that of selective checkpointing counts operators, and forward and recomputation must run the
    same ones. Not in inference mode, whose tensors autograd refuses later.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_inference_mode_enabled():
        return False
    for t in tensors:
        if t.is_inference():
            return False
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def stream_of(x: Tensor) -> int:
    """The current stream of the device of x: what one stream made, another may read before it is there."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


_ones: dict[tuple[Any, ...], Tensor] = {}


def ones(n: int, like: Tensor) -> Tensor:
    """[n] ones in the dtype and on the device of ``like``; not to be written to."""
    if not may_keep(like):
        return like.new_ones(n)
    key = (n, like.dtype, like.device, stream_of(like))
    found = _ones.get(key)
    if found is None:
        found = _ones[key] = like.new_ones(n)
    return found


_DISTRIBUTED = dist.is_available()


class KeptEqualizer:
    """d and 1/d of a layer, made again when its exponents change. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[tuple[int, int], Equalizer]] = {}

    def get(self, exponent: Tensor, *, sharded: bool = False) -> Equalizer:
        """Of log2 d, [K] int8.

        Args:
            sharded: FSDP2 has the layer, so DDP has it not, which broadcasts buffers without giving them a new version.
        """
        if not may_keep(exponent) or (_DISTRIBUTED and dist.is_initialized() and not sharded):
            return Equalizer.of_exponents(exponent)
        key, stream = (exponent._version, exponent.data_ptr()), stream_of(exponent)
        made = self._made.get(stream)
        if made is None or made[0] != key:
            made = self._made[stream] = key, Equalizer.of_exponents(exponent)
        return made[1]

    def __reduce__(self) -> tuple[type[KeptEqualizer], tuple[()]]:
        return KeptEqualizer, ()
