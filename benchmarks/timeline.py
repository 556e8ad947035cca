"""Where the GPU time of a distributed training step goes: by kind of kernel, and what communication it waits for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

COMMUNICATION = "nccl"

CATEGORIES = (
    (COMMUNICATION, r"nccl"),
    ("attention", r"flash|fmha|cudnn|sdpa"),
    ("triton", r"^triton"),
    ("8-bit GEMM", r"nvjet_sm90_q|matmul"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma"),
    ("rotate, round", r"halo_train|quantize"),
    ("optimiser", r"multi_tensor|adam"),
    ("copies of FSDP2", r"split_with_sizes|chunk_cat|CatArray"),
)
"""(kind, pattern on the names of its kernels); the first that matches counts, all others are "other"."""


def timeline(step: Callable[[], Any]) -> dict[str, Any]:
    """One step under the profiler, in milliseconds.

    Returns:
        ``kernels``: sum of kernel times by category. ``compute``: time in which any kernel but NCCL's runs. ``exposed``: time in
        which only NCCL's run. ``idle``: time in which none runs, from the first kernel to the last.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    compute, everything = [], []
    for event in found.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA or not event.duration_ns():
            continue
        category = category_of(event.name())
        kernels[category] = kernels.get(category, 0.0) + event.duration_ns() / 1e6
        span = event.start_ns(), event.start_ns() + event.duration_ns()
        everything.append(span)
        if category != COMMUNICATION:
            compute.append(span)
    busy, running = covered(compute), covered(everything)
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    return {
        "kernels": kernels,
        "compute": busy / 1e6,
        "exposed": (running - busy) / 1e6,
        "idle": (whole - running) / 1e6,
    }


def category_of(kernel: str) -> str:
    """Which of :data:`CATEGORIES`, or "other"."""
    return next((name for name, pattern in CATEGORIES if re.search(pattern, kernel)), "other")


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, end)."""
    total, until = 0, -1
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0)
        until = max(until, end)
    return total
