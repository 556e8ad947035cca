"""Operations of a step's matrix products: how many, how many of them in 8 bits, and what a GPU could do at most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from halo_train import HaloLinear
from halo_train.config import Format

from .data import Batch

BF16_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 operations a second by NVIDIA's data sheets, the first part of a name that matches counts."""


def bf16_peak(device: torch.device) -> float | None:
    """Peak of a GPU in :data:`BF16_PEAKS`; None for others and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Flops:
    """Additions and multiplications in matrix products."""

    total: float
    eight_bit: float
    """Of those, in products of 8-bit operands."""


class FlopCounter:
    """Matrix operations of training steps of a converted model, forward and backward, by the shapes of its weights.

    Counted is what a step needs: real tokens without padding, the output layer for trained tokens only, attention for the
    pairs that a causal mask leaves within a document (a sliding window counts as none). Not counted is what is done
    twice for memory. Weights that are frozen have no wgrad. Of stacked experts those that a token is sent to count.

    Args:
        model: of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._per_token = self._eight_bit_per_token = 0.0
        for module in model.modules():
            if isinstance(module, nn.Embedding) or module is head:
                continue
            for weight in module.parameters(recurse=False):
                if weight.dim() < 2:
                    continue
                ops = _products(weight) * 2.0 * weight.numel()
                if weight.dim() == 3:
                    ops *= _active_share(config, weight.shape[0])
                self._per_token += ops
                if _in_8_bits(module):
                    self._eight_bit_per_token += ops
        self._per_trained_token = 0.0 if head is None else _products(head.weight) * 2.0 * head.weight.numel()
        self._eight_bit_per_trained_token = self._per_trained_token if _in_8_bits(head) else 0.0
        heads = getattr(config, "num_attention_heads", 0)
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        # Scores and values, each one product forward and two backward.
        self._per_pair = 2 * 3 * 2.0 * config.num_hidden_layers * heads * width

    def step(self, batches: Iterable[Batch]) -> Flops:
        """Of one forward and backward of each batch."""
        total = eight_bit = 0.0
        for batch in batches:
            eight_bit += self._eight_bit_per_token * batch.tokens
            eight_bit += self._eight_bit_per_trained_token * batch.trained
            total += self._per_token * batch.tokens + self._per_trained_token * batch.trained
            total += self._per_pair * _attended_pairs(batch)
        return Flops(total, eight_bit)


def _in_8_bits(module: nn.Module | None) -> bool:
    return isinstance(module, HaloLinear) and module.config.format is not Format.HIGH_PRECISION


def _products(weight: torch.Tensor) -> int:
    """fprop, dgrad and, if the weight is trained, wgrad."""
    return 3 if weight.requires_grad else 2


def _active_share(config: object, experts: int) -> float:
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return min(1.0, chosen / experts) if chosen else 1.0


def _attended_pairs(batch: Batch) -> float:
    """(query, key) pairs under a causal mask; padding in the share that it has of the tokens."""
    rows, length = batch.ids.shape
    if batch.positions is not None:
        pairs = float((batch.positions + 1).sum())
    else:
        pairs = rows * length * (length + 1) / 2
    return pairs * batch.tokens / batch.ids.numel()
