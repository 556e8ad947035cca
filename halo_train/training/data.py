"""Rows of a JSONL file -> token ids with a loss mask -> batches in a reproducible order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

IGNORE = -100
"""Label of a token that carries no loss."""

PAD_MULTIPLE = 16
"""Batches are padded to a multiple of this length, so that the 8-bit products need no padding of their own."""

_WINDOW = 16
"""Batches that are sorted by length together: little padding, and still a random order."""


@dataclass(frozen=True)
class Row:
    """One line of a file. ``prompt`` is None for a ``text`` row, all of which is trained."""

    prompt: str | None
    completion: str


@dataclass(frozen=True)
class Example:
    """Token ids of one row and how many of them, from the front, carry no loss."""

    ids: list[int]
    masked: int


@dataclass(frozen=True)
class Dataset:
    """Examples and what the mask and the cut to ``seq_len`` left of them."""

    examples: list[Example]
    tokens: int
    trained_tokens: int
    cut: int
    """Rows that were longer than seq_len."""
    dropped: int
    """Rows of which no trained token was left after the cut."""

    def __str__(self) -> str:
        share = 100 * self.trained_tokens / self.tokens
        text = f"{len(self.examples)} rows, {self.tokens} tokens, {share:.1f}% of them trained"
        if self.cut:
            text += f"; cut at seq_len: {self.cut}"
        if self.dropped:
            text += f"; dropped, because the completion starts after seq_len: {self.dropped}"
        return text


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file: ``{"prompt": ..., "completion": ...}`` or ``{"text": ...}``; other fields are ignored.

    Raises:
        UserError: no such file, no row, or a line that is no JSON object, lacks a field or has one of the wrong type;
            names the file and the line.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; set data.train or data.valid to a JSONL file")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        raise UserError(f"data file {path} has no rows; each line must be a JSON object")
    return rows


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
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


def encode_rows(rows: Sequence[Row], tokenizer: Any, seq_len: int, name: str) -> Dataset:
    """Token ids with the loss on completions (and their end-of-text token) only.

    Prompt and completion are tokenised apart, so the mask ends exactly where the completion starts.

    Args:
        rows: at least one.
        tokenizer: of transformers, with an eos token.
        seq_len: tokens; longer rows are cut at their end.
        name: of the config field, for messages.

    Raises:
        UserError: no eos token; no trained token in the whole file.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer in model.path has no eos_token, so a model cannot learn where a completion ends; add one to "
            "its tokenizer_config.json"
        )
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    prompts = _token_ids(tokenizer, [row.prompt or "" for row in rows])
    completions = _token_ids(tokenizer, [row.completion for row in rows])
    examples, cut = [], 0
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        ids = start + prompt + completion + [tokenizer.eos_token_id]
        # The first token of a text has nothing before it to be predicted from.
        masked = max(1, len(start) + len(prompt)) if row.prompt is not None else 1
        cut += len(ids) > seq_len
        if masked < min(len(ids), seq_len):
            examples.append(Example(ids[:seq_len], masked))
    tokens = sum(len(example.ids) for example in examples)
    trained = sum(len(example.ids) - example.masked for example in examples)
    if trained == 0:
        raise UserError(
            f"{name}: none of the {len(rows)} rows has a token to train on within data.seq_len={seq_len}; raise "
            "data.seq_len or shorten the prompts"
        )
    return Dataset(examples, tokens, trained, cut, len(rows) - len(examples))


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and labels [B, S], int64; S is the longest example rounded up to :data:`PAD_MULTIPLE`.

    Labels are the ids themselves (the shift is the loss's business), :data:`IGNORE` on prompts and padding. Padding is
    on the right, where causal attention keeps it from every real token, so no attention mask is needed.
    """
    longest = max(len(example.ids) for example in examples)
    shape = (len(examples), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    for i, example in enumerate(examples):
        row = torch.tensor(example.ids)
        ids[i, : len(row)] = row
        labels[i, example.masked : len(row)] = row[example.masked :]
    return ids, labels


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
        if len(examples) < micro_batch:
            raise UserError(
                f"train.micro_batch must be at most the number of training rows, {len(examples)}; got {micro_batch}"
            )
        self.examples, self.micro_batch, self.pad_id, self.seed = examples, micro_batch, pad_id, seed
        self.position = position
        self._epoch = -1
        self._order: list[list[int]] = []

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels, see :func:`collate`."""
        per_epoch = len(self.examples) // self.micro_batch
        epoch, index = divmod(self.position, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch, per_epoch)
        self.position += 1
        return collate([self.examples[i] for i in self._order[index]], self.pad_id)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def _shuffle(self, epoch: int, batches: int) -> list[list[int]]:
        # No two runs of a few seeds and a million epochs share an order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()[: batches * self.micro_batch]
        window = _WINDOW * self.micro_batch
        by_length = [
            index
            for start in range(0, len(order), window)
            for index in sorted(order[start : start + window], key=lambda i: len(self.examples[i].ids))
        ]
        cut = [by_length[i : i + self.micro_batch] for i in range(0, len(by_length), self.micro_batch)]
        return [cut[i] for i in torch.randperm(batches, generator=generator).tolist()]


def fixed_batches(examples: Sequence[Example], micro_batch: int, pad_id: int) -> list[tuple[Tensor, Tensor]]:
    """All examples, longest first, in batches of at most ``micro_batch`` rows; for validation."""
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [collate(ordered[i : i + micro_batch], pad_id) for i in range(0, len(ordered), micro_batch)]


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one complete JSON object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: must be a JSON object such as {{"prompt": ..., "completion": ...}}; got {line.strip()[:60]!r}'
        )
    if "text" in row and "completion" not in row:
        return Row(None, _string(row, "text", where))
    if "prompt" in row and "completion" in row:
        return Row(_string(row, "prompt", where, may_be_empty=True), _string(row, "completion", where))
    missing = "completion" if "prompt" in row else "prompt" if "completion" in row else ""
    needed = f"the field {missing!r} is missing" if missing else "needs 'prompt' and 'completion', or 'text'"
    raise UserError(
        f"{where}: {needed}; the row has {', '.join(map(repr, row)) or 'no field'}; add or rename fields"
    )


def _string(row: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {field!r} must be a string; got {type(value).__name__} {value!r:.60}; put it in quotes"
        )
    if not value and not may_be_empty:
        raise UserError(
            f"{where}: {field!r} is empty, so there is nothing to train on; remove the line or fill the field"
        )
    return value
