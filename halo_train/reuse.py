"""Small tensors that are made once and used in later calls: when that is allowed, and the vectors that are kept so."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .quantize import Equalizer


def keeping_stream(x: Tensor) -> int | None:
    """The current stream of the device of x if what is made of x now may be used again in a later call on that stream (what one
    stream made, another may read before it is there), else None.

    Not while something compiles or captures, which would use it for ever and, in a CUDA graph, from memory of the graph.
    Not under a dispatch mode: that of selective checkpointing counts operators, and forward and recomputation must run the
    same ones. Not in inference mode, whose tensors autograd refuses later.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    if torch.is_inference_mode_enabled() or x.is_inference():
        return None
    if not x.is_cuda:
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(x.get_device())


_ones: dict[tuple[Any, ...], Tensor] = {}


def ones(n: int, like: Tensor) -> Tensor:
    """[n] ones in the dtype and on the device of ``like``; not to be written to."""
    stream = keeping_stream(like)
    if stream is None:
        return like.new_ones(n)
    key = (n, like.dtype, like.device, stream)
    found = _ones.get(key)
    if found is None:
        found = _ones[key] = like.new_ones(n)
    return found


_DISTRIBUTED = dist.is_available()


class KeptEqualizer:
    """d and 1/d of a layer, made again when its exponents change. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[tuple[int, int], Equalizer]] = {}

    def get(self, exponent: Tensor, stream: int | None, *, sharded: bool = False) -> Equalizer:
        """Of log2 d, [K] int8.

        Args:
            stream: :func:`keeping_stream` of exponent.
            sharded: FSDP2 has the layer, so DDP has it not, which broadcasts buffers without giving them a new version.
        """
        if stream is None or (_DISTRIBUTED and dist.is_initialized() and not sharded):
            return Equalizer.of_exponents(exponent)
        key = (exponent._version, exponent.data_ptr())
        made = self._made.get(stream)
        if made is None or made[0] != key:
            made = self._made[stream] = key, Equalizer.of_exponents(exponent)
        return made[1]

    def __reduce__(self) -> tuple[type[KeptEqualizer], tuple[()]]:
        return KeptEqualizer, ()
