"""Tokenised documents -> batches in a reproducible order; the split into training and validation documents."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
from .packing import one_a_row, pack
from .store import Documents

IGNORE = -100
"""Label of a token that carries no loss."""

PAD_MULTIPLE = 16
"""Batches are padded to a multiple of this length, so that the 8-bit products need no padding of their own."""

_WINDOW = 16
"""Batches that are sorted by length together: little padding, and still a random order."""

_AHEAD = 4
"""Batches that wait, ready, for the training loop."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; S is a multiple of :data:`PAD_MULTIPLE`.

    Padding is on the right, where causal attention keeps it from every real token, so there is no attention mask.
    """

    ids: Tensor
    """Token ids, int64 [B, S]."""
    labels: Tensor
    """int64 [B, S]: the ids themselves (the shift is the loss's business), :data:`IGNORE` on what is not trained."""
    positions: Tensor | None
    """int64 [B, S] of packed documents: each counts from 0, by which models of transformers keep them apart. None where a
    row is one document."""
    tokens: int
    """Without padding."""
    trained: int
    """Labels that carry loss."""

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of :class:`halo_train.training.loss.TokenLoss`, which takes the labels from the CPU."""
        moved = {"ids": self.ids.to(device, non_blocking=True), "labels": self.labels}
        if self.positions is not None:
            moved["position_ids"] = self.positions.to(device, non_blocking=True)
        return moved

    def pin_memory(self) -> Batch:
        """For torch.utils.data.DataLoader."""
        positions = None if self.positions is None else self.positions.pin_memory()
        return replace(self, ids=self.ids.pin_memory(), positions=positions)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the pipe between the processes as int32: a tensor would go into shared memory, for which the loop has to
        # call the other process back, three times a batch.
        tensors = (self.ids, self.labels, self.positions)
        arrays = [None if tensor is None else tensor.numpy().astype(np.int32) for tensor in tensors]
        return _unpickle, (arrays, self.tokens, self.trained)


def _unpickle(arrays: Sequence[NDArray[np.int32] | None], tokens: int, trained: int) -> Batch:
    ids, labels, positions = (None if array is None else torch.from_numpy(array).long() for array in arrays)
    assert ids is not None
    assert labels is not None
    return Batch(ids, labels, positions, tokens, trained)


def collate(rows: Sequence[Sequence[NDArray[np.int32]]], pad_id: int, width: int | None = None) -> Batch:
    """A batch of rows of documents, each as :meth:`halo_train.training.store.Documents.document` gives it.

    Args:
        width: of packed rows, at least the tokens of each; None for rows of one document, as wide as the longest.
    """
    lengths = [sum(map(len, row)) for row in rows]
    needed = max(lengths) if width is None else width
    shape = (len(rows), -(-needed // PAD_MULTIPLE) * PAD_MULTIPLE)
    coded = np.full(shape, ~pad_id, np.int64)
    positions = np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        coded[i, : lengths[i]] = np.concatenate(row)
        padding = shape[1] - lengths[i]
        positions[i] = np.concatenate([np.arange(n) for n in [*map(len, row), padding]])
    masked = coded < 0
    return Batch(
        ids=torch.from_numpy(np.where(masked, ~coded, coded)),
        labels=torch.from_numpy(np.where(masked, IGNORE, coded)),
        positions=None if width is None else torch.from_numpy(positions),
        tokens=sum(lengths),
        trained=int((~masked).sum()),
    )


class Split:
    """The training or the validation rows of a store, arranged in rows of batches.

    Args:
        rows: of the source, in order.
        name: of the config field, for messages.
        seq_len: of the store.
        packing: fill each row of a batch with documents up to ``seq_len``; else each document has a row of its own.
        seed: of the packing.

    Raises:
        UserError: no trained token in any of the rows.
    """

    def __init__(
        self,
        store: Documents,
        rows: NDArray[np.int64],
        name: str,
        *,
        seq_len: int,
        packing: bool = False,
        seed: int = 0,
    ) -> None:
        documents = np.flatnonzero(np.isin(store.index["row"], rows))
        if not len(documents):
            raise UserError(
                f"{name}: none of the {len(rows)} rows has a token to train on within data.seq_len={seq_len}; raise "
                "data.seq_len or shorten the prompts"
            )
        index, lengths = store.index[documents], store.lengths()[documents]
        self.store, self.width = store, seq_len if packing else None
        self.rows = pack(documents, lengths, seq_len, seed) if packing else one_a_row(documents, lengths)
        self.tokens, self.trained_tokens = int(lengths.sum()), int(index["trained"].sum())
        kept = np.unique(index["row"])
        self.kept, self.dropped = len(kept), len(rows) - len(kept)
        self.cut = len(np.unique(index["row"][index["cut"]]))

    def batch(self, rows: Iterable[int], pad_id: int) -> Batch:
        """The rows of these numbers, see :func:`collate`."""
        return collate([[*map(self.store.document, self.rows[row])] for row in rows], pad_id, self.width)

    def __str__(self) -> str:
        text = f"{self.kept} rows, {self.tokens} tokens, "
        text += f"{100 * self.trained_tokens / self.tokens:.1f}% of them trained"
        if self.width is not None:
            full = 100 * self.tokens / (len(self.rows) * self.width)
            text += f"; packed into {len(self.rows)} of {self.width} tokens, {full:.1f}% full"
        if self.cut:
            text += f"; cut at seq_len: {self.cut}"
        if self.dropped:
            text += f"; dropped, without a trained token left: {self.dropped}"
        return text


def validation_rows(rows: int, fraction: float, seed: int) -> NDArray[np.int64]:
    """Numbers, in order, of the rows that validate: a random ``fraction`` of ``rows``, at least one.

    Raises:
        UserError: fewer than two rows.
    """
    if rows < 2:
        raise UserError(
            f"data.train must have at least 2 rows to split off a validation row; got {rows}; set data.valid"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(fraction * rows)), rows - 1)
    return order[:count].sort().values.numpy()


def batches_per_epoch(rows: int, micro_batch: int) -> int:
    """Full batches in ``rows``; the rows left over wait for the next epoch's order.

    Raises:
        UserError: fewer rows than one batch.
    """
    if rows < micro_batch:
        raise UserError(
            f"train.micro_batch must be at most the number of training rows, {rows}; got {micro_batch}; lower it, or lower "
            "data.seq_len where data.packing puts many documents in a row"
        )
    return rows // micro_batch


class ShuffledBatches(Dataset[Batch]):
    """Endless batches of ``micro_batch`` rows, reshuffled each epoch; batch ``n`` depends on ``seed`` and ``n`` alone.

    Raises:
        UserError: fewer rows than one batch.
    """

    def __init__(self, split: Split, micro_batch: int, pad_id: int, seed: int) -> None:
        self._per_epoch = batches_per_epoch(len(split.rows), micro_batch)
        self._split, self._micro_batch, self._pad_id, self._seed = split, micro_batch, pad_id, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Batch:
        epoch, index = divmod(number, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._split.batch(self._order[index], self._pad_id)

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        """Rows of each batch, int64 [batches, micro_batch]."""
        # No two runs of a few seeds and a million epochs share an order.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        rows = len(self._split.rows)
        order = torch.randperm(rows, generator=generator).numpy()[: self._per_epoch * self._micro_batch]
        # A stable sort by window and length.
        window = np.arange(len(order)) // (_WINDOW * self._micro_batch)
        order = order[np.lexsort((self._split.rows.lengths[order], window))]
        batches = torch.randperm(self._per_epoch, generator=generator).numpy()
        return order.reshape(self._per_epoch, self._micro_batch)[batches]


class BatchStream:
    """The batches of one process of a run, prepared ahead by a process of their own; use it in a ``with`` statement.

    All ranks together take batches 0, 1, 2, ... of :class:`ShuffledBatches`, ``world_size`` at a time, one each. So the
    position of a run does not depend on the number of its processes.

    Args:
        position: batches that all ranks together took before, e.g. from a checkpoint.
        rank, world_size: of this process.

    Raises:
        UserError: fewer rows than one batch.
    """

    def __init__(
        self,
        split: Split,
        micro_batch: int,
        pad_id: int,
        seed: int,
        position: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.position, self._world_size = position, world_size
        self._batches: Iterator[Batch] | None = iter(
            DataLoader(
                ShuffledBatches(split, micro_batch, pad_id, seed),
                batch_size=None,
                sampler=itertools.count(position + rank, world_size),
                num_workers=1,
                prefetch_factor=_AHEAD,
                worker_init_fn=_belong_to_the_run,
                pin_memory=torch.cuda.is_available(),  # by a thread, so that taking a batch costs the loop nothing
                # DataLoader draws a seed for its workers; from the global generator that would change the run's dropout.
                generator=torch.Generator(),
            )
        )

    def __next__(self) -> Batch:
        if self._batches is None:
            raise ValueError("the stream is closed; take batches inside its with statement")
        batch = next(self._batches)
        self.position += self._world_size
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches = None  # ends the process


def _belong_to_the_run(worker: int) -> None:
    # Ctrl-C and job schedulers signal every process of a group, but the run wants its batches until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    # A run that is killed cannot end its processes; DataLoader notices only where they were forked.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class FixedBatches(Sequence[Batch]):
    """All rows of a split, longest first, in batches of at most ``micro_batch``; for validation. Made when they are asked for."""

    def __init__(self, split: Split, micro_batch: int, pad_id: int) -> None:
        self._split, self._micro_batch, self._pad_id = split, micro_batch, pad_id
        self._order = np.argsort(-split.rows.lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self._order) // self._micro_batch)

    def __getitem__(self, number: int) -> Batch:  # type: ignore[override]  # no slices
        if number >= len(self):
            raise IndexError(number)
        start = number * self._micro_batch
        return self._split.batch(self._order[start : start + self._micro_batch], self._pad_id)
