"""Bytes that the collectives of torch.distributed carry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

COLLECTIVES = {
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_reduce": ("all_reduce",),
}
"""What FSDP2 calls, by kind; the first that this PyTorch has."""


@contextlib.contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """Bytes that this rank puts into the collectives of torch.distributed."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    originals: dict[str, Any] = {}

    def counting(kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            position = 0 if kind == "all_reduce" else 1
            sent = (
                args[position]
                if len(args) > position
                else kwargs.get("input_tensor", kwargs.get("input", kwargs.get("tensor")))
            )
            counts[kind] += sent.numel() * sent.element_size()
            return function(*args, **kwargs)

        return call

    for kind, names in COLLECTIVES.items():
        name = next(name for name in names if hasattr(dist, name))
        originals[name] = getattr(dist, name)
        setattr(dist, name, counting(kind, originals[name]))
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
