"""The signs of a random rotation, which a seed fixes, kept where they are used so that a call does not wait for a copy."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from .reference import signs_of_bits


def signs_of_seed(n: int, seed: int, stream: int) -> Tensor:
    """n signs of the round ``stream``: int8 +-1 [n] on the CPU."""
    return signs_of_bits(bits_of_seed(n, seed, stream))[:n]


def bits_of_seed(n: int, seed: int, stream: int) -> Tensor:
    """The signs as bits, uint8 [ceil(n / 8)]."""
    digest = hashlib.shake_128(f"halo_train signs {seed} {stream}".encode()).digest((n + 7) // 8)
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8) if n else torch.zeros(0, dtype=torch.uint8)


@functools.lru_cache(maxsize=256)
def kept_signs(n: int, seed: int, stream: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return signs_of_seed(n, seed, stream).to(device, dtype)


@functools.lru_cache(maxsize=256)
def kept_bits(n: int, seed: int, stream: int, device: torch.device) -> Tensor:
    return bits_of_seed(n, seed, stream).to(device)


def random_signs(like: Tensor, n: int, seed: int, stream: int) -> Tensor:
    """int8 +-1 [n] on the device of ``like``; a copy, as an operator must return."""
    return kept_signs(n, seed, stream, like.device, torch.int8).clone()


def random_bits(like: Tensor, n: int, seed: int, stream: int) -> Tensor:
    """The same as bits, uint8 [ceil(n / 8)]."""
    return kept_bits(n, seed, stream, like.device).clone()
