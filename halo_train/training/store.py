"""Tokenised documents on disk, read through memory maps: a run holds an index of them in memory, never the tokens.

A store is a folder that appears whole or not at all::

    tokens.bin   int32, documents one after the other; a token without loss is stored as its complement, ``~id``
    index.bin    one INDEX record a document
    meta.json    what the store was made from, and its counts
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDEX = np.dtype([("end", "<i8"), ("row", "<i8"), ("trained", "<i4"), ("cut", "?")])
"""Of a document: where it ends in tokens.bin, the row of the file that it is from, its trained tokens, and whether the row
was cut at data.seq_len."""

Span = tuple[int, int]
"""Start and end (exclusive)."""


@dataclass(frozen=True)
class Example:
    """Token ids of one document, and the spans of them that carry loss: in order, never the first token."""

    ids: Sequence[int]
    trained: Sequence[Span]
    row: int = 0
    """Of the file."""
    cut: bool = False
    """The row was longer and lost its end."""


@dataclass(frozen=True)
class Chunk:
    """Documents in the store's own form, as processes hand them to each other."""

    tokens: NDArray[np.int32]
    index: NDArray[Any]
    """INDEX records; ``end`` and ``row`` count from the start of the chunk."""
    rows: int
    """Rows read, with those of which nothing was left."""


def make_chunk(examples: Sequence[Example], rows: int) -> Chunk:
    """Examples of ``rows`` rows in the store's form."""
    index = np.zeros(len(examples), INDEX)
    index["end"] = np.cumsum([len(example.ids) for example in examples])
    index["row"] = [example.row for example in examples]
    index["cut"] = [example.cut for example in examples]
    tokens = ~np.fromiter((token for example in examples for token in example.ids), np.int32)
    for i, example in enumerate(examples):
        offset = index["end"][i] - len(example.ids)
        for start, end in example.trained:
            index["trained"][i] += end - start
            tokens[offset + start : offset + end] = ~tokens[offset + start : offset + end]
    return Chunk(tokens, index, rows)


class StoreWriter:
    """Writes a store chunk by chunk; :meth:`finish` puts it in its place, and leaving without it removes what was written.

    Args:
        folder: of the store, which does not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
        self._digest = hashlib.blake2b(digest_size=16)
        self._tokens = (self._temporary / "tokens.bin").open("wb")
        self._index = (self._temporary / "index.bin").open("wb")
        self.rows = self.documents = self.tokens = 0

    def write(self, chunk: Chunk) -> None:
        index = chunk.index.copy()
        index["end"] += self.tokens
        index["row"] += self.rows
        for file, values in ((self._tokens, chunk.tokens.astype("<i4")), (self._index, index)):
            file.write(values.tobytes())
            self._digest.update(values.tobytes())
        self.rows += chunk.rows
        self.documents += len(index)
        self.tokens += len(chunk.tokens)

    def finish(self, **meta: Any) -> None:
        """Puts the store in its place; where another process was faster, its store stays."""
        self._close()
        counts = {"rows": self.rows, "documents": self.documents, "tokens": self.tokens}
        meta = meta | counts | {"digest": self._digest.hexdigest()}
        (self._temporary / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        try:
            os.rename(self._temporary, self._folder)
        except OSError:
            if not self._folder.is_dir():
                raise
            shutil.rmtree(self._temporary)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _close(self) -> None:
        self._tokens.close()
        self._index.close()


TEMPORARY = ".writing-"
"""Start of the name of a store that is being written."""


class Documents:
    """Tokenised documents.

    Args:
        chunk: one that holds all of them.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._tokens, self.index, self.rows = chunk.tokens, chunk.index, chunk.rows

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.index["end"], prepend=0)

    def document(self, number: int) -> NDArray[np.int32]:
        """Tokens of a document, those without loss as ``~id``."""
        start = self.index["end"][number - 1] if number else 0
        return self._tokens[start : self.index["end"][number]]


class TokenStore(Documents):
    """A finished store, opened for reading. Pickles as its path, so that processes share the maps.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.digest: str = meta["digest"]
        """Of the tokens, their order and what of them is trained."""
        tokens, index = _map(folder / "tokens.bin", np.dtype("<i4")), _map(folder / "index.bin", INDEX)
        super().__init__(Chunk(tokens, index, meta["rows"]))

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self._folder,)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file as an array that is read where it is touched; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
