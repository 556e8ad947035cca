"""The data of a run: read, split, tokenised, arranged in rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import latest_checkpoint
from .config import STDLIB, Config
from .data import FixedBatches, Split, validation_rows
from .errors import UserError
from .exact_match import Question, questions
from .formats import row_format
from .logging import write_atomically
from .loop import total_steps
from .model import load_tokenizer
from .sources import open_source
from .stdlib_data import stdlib_pairs_file
from .tokenised import read_rows, tokenised


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    tokenizer: Any
    train: Split
    valid: FixedBatches
    steps: int
    """Optimiser steps of the run."""
    questions: list[Question]
    """That the model answers on the way, of the section ``eval``; none without it."""
    digests: dict[str, str]
    """Of the tokens, by config field."""

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)


def pad_id(tokenizer: Any) -> int:
    """Of the token that fills rows, which is never trained: eos where the tokenizer has no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_data(config: Config, folder: Path) -> Data:
    """Reads, splits and tokenises; prints what there is.

    Args:
        folder: of the run, for its tokenizer.

    Raises:
        UserError: a source that is missing or malformed, or without a trained token; too few rows; a warm-up that is
            longer than the epochs.
    """
    section, seed = config.data, config.run.seed
    if section.train == STDLIB:
        print("collecting the documented functions of Python's standard library", flush=True)
    file = str(stdlib_pairs_file(section.cache_dir)) if section.train == STDLIB else section.train
    source = open_source(file, section.subset, section.split, "data.train")
    form = row_format(source, section.format, section.rename)

    def held_out(rows: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64) if section.valid else validation_rows(rows, section.valid_fraction, seed)

    def training_texts() -> Iterator[str]:
        valid = set(held_out(sum(1 for _ in source.rows())).tolist())
        for number, row in enumerate(read_rows(source, form)):
            yield from row.texts if number not in valid else ()

    # The texts are read only where the tokenizer is trained.
    tokenizer = load_tokenizer(Path(config.model.path), training_texts(), folder / "tokenizer")
    store = tokenised(source, form, tokenizer, section.seq_len, section.cache_dir)
    print(f"{store.rows} rows of {source.name}, format {form.name}", flush=True)
    if section.valid is None:
        valid_store, valid_rows = store, held_out(store.rows)
        train_rows = np.setdiff1d(np.arange(store.rows), valid_rows, assume_unique=True)
    else:
        valid_source = open_source(section.valid, section.subset, section.valid_split, "data.valid")
        valid_form = row_format(valid_source, section.format, section.rename)
        valid_store = tokenised(valid_source, valid_form, tokenizer, section.seq_len, section.cache_dir)
        train_rows, valid_rows = np.arange(store.rows), np.arange(valid_store.rows)
    arranged = partial(Split, seq_len=section.seq_len, packing=section.packing, seed=seed)
    train, valid = arranged(store, train_rows, "data.train"), arranged(valid_store, valid_rows, "data.valid")
    steps = total_steps(config.train, len(train.rows))
    print(f"training data:   {train}\nvalidation data: {valid}\ntraining steps:  {steps}", flush=True)
    valid_batches = FixedBatches(valid, config.train.micro_batch, pad_id(tokenizer))
    digests = {"data.train": store.digest, "data.valid": valid_store.digest}
    return Data(tokenizer, train, valid_batches, steps, _load_questions(config, tokenizer), digests)


def require_same_data(folder: Path, data: Data) -> None:
    """That a run goes on with the tokens it started with; writes down which they are.

    Args:
        folder: of the run.

    Raises:
        UserError: a file, the tokenizer or its chat template has changed since the run was started.
    """
    file = folder / "data.json"
    if file.is_file() and latest_checkpoint(folder / "checkpoints") is not None:
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [field for field, digest in data.digests.items() if before[field] != digest]
        if changed:
            raise UserError(
                f"{folder} was started with other tokens of {' and '.join(changed)}: the data, the tokenizer or its chat "
                "template has changed; put it back to go on, or use another run.name, or run.overwrite=true"
            )
    write_atomically(file, json.dumps(data.digests, indent=2) + "\n")


def _load_questions(config: Config, tokenizer: Any) -> list[Question]:
    section = config.eval
    if section.exact_match is None:
        return []
    source = open_source(section.exact_match, None, config.data.valid_split, "eval.exact_match")
    rows = read_rows(source, row_format(source, config.data.format, config.data.rename))
    return questions(list(islice(rows, section.limit)), tokenizer, section.pattern, source.name)
