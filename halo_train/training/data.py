"""Token ids with a loss mask -> batches in a reproducible order; the split into training and validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .encode import Example
from .errors import UserError

_Row = TypeVar("_Row")

IGNORE = -100
"""Label of a token that carries no loss."""

PAD_MULTIPLE = 16
"""Batches are padded to a multiple of this length, so that the 8-bit products need no padding of their own."""

_WINDOW = 16
"""Batches that are sorted by length together: little padding, and still a random order."""


def split_rows(rows: Sequence[_Row], fraction: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    """Training and validation rows: a random ``fraction`` of them, at least one, is for validation.

    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"data.train must have at least 2 rows to split off a validation row; got {len(rows)}; set data.valid"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and labels [B, S], int64; S is the longest example rounded up to :data:`PAD_MULTIPLE`.

    Labels are the ids themselves (the shift is the loss's business), :data:`IGNORE` on what is not trained. Padding is
    on the right, where causal attention keeps it from every real token, so no attention mask is needed.
    """
    longest = max(len(example.ids) for example in examples)
    shape = (len(examples), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    for i, example in enumerate(examples):
        row = torch.tensor(example.ids)
        ids[i, : len(row)] = row
        for start, end in example.trained:
            labels[i, start:end] = row[start:end]
    return ids, labels


def batches_per_epoch(rows: int, micro_batch: int) -> int:
    """Full batches in ``rows``; the rows left over wait for the next epoch's order.

    Raises:
        UserError: fewer rows than one batch.
    """
    if rows < micro_batch:
        raise UserError(
            f"train.micro_batch must be at most the number of training rows, {rows}; got {micro_batch}"
        )
    return rows // micro_batch


class BatchStream:
    """Endless batches [micro_batch, S] of reshuffled epochs; the order depends on ``seed`` alone.

    Args:
        position: batches that were taken before, e.g. from a checkpoint.

    Raises:
        UserError: fewer rows than one batch.
    """

    def __init__(
        self, examples: Sequence[Example], micro_batch: int, pad_id: int, seed: int, position: int = 0
    ) -> None:
        self._per_epoch = batches_per_epoch(len(examples), micro_batch)
        self.examples, self.micro_batch, self.pad_id, self.seed = examples, micro_batch, pad_id, seed
        self.position = position
        self._epoch = -1
        self._order: list[list[int]] = []

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels, see :func:`collate`."""
        epoch, index = divmod(self.position, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        self.position += 1
        return collate([self.examples[i] for i in self._order[index]], self.pad_id)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def _shuffle(self, epoch: int) -> list[list[int]]:
        # No two runs of a few seeds and a million epochs share an order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        order = order[: self._per_epoch * self.micro_batch]
        window = _WINDOW * self.micro_batch
        by_length = [
            index
            for start in range(0, len(order), window)
            for index in sorted(order[start : start + window], key=lambda i: len(self.examples[i].ids))
        ]
        cut = [by_length[i : i + self.micro_batch] for i in range(0, len(by_length), self.micro_batch)]
        return [cut[i] for i in torch.randperm(self._per_epoch, generator=generator).tolist()]


def fixed_batches(examples: Sequence[Example], micro_batch: int, pad_id: int) -> list[tuple[Tensor, Tensor]]:
    """All examples, longest first, in batches of at most ``micro_batch`` rows; for validation."""
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [collate(ordered[i : i + micro_batch], pad_id) for i in range(0, len(ordered), micro_batch)]
