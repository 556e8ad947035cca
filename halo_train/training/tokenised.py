"""From a source to its tokenised store: in several processes, kept on disk for the next run, removed when the source changed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import chat_template, encode, formats, sources, store
from .encode import Encoder
from .errors import UserError
from .formats import Conversation, Row, RowFormat
from .sources import PLACE, Source
from .store import TEMPORARY, Chunk, StoreWriter, TokenStore, make_chunk

_DAY = 86400

_ROWS_AT_ONCE = 2000


def read_rows(source: Source, form: RowFormat) -> Iterator[Row | Conversation]:
    """All rows of a source in order; errors as :meth:`Source.read` and :class:`RowFormat`."""
    return (form(where, fields) for where, fields in source.rows())


def tokenised(source: Source, form: RowFormat, tokenizer: Any, seq_len: int, cache_dir: Path) -> TokenStore:
    """The store of a source: that of an earlier run, or made now, in as many processes as there are cores.

    Args:
        seq_len: see :class:`halo_train.training.encode.Encoder`.
        cache_dir: ``data.cache_dir``; stores are folders in its ``tokens``.

    Raises:
        UserError: a row, tokenizer or template that cannot be used; a cache_dir that cannot be written.
    """
    fingerprint = source.fingerprint()
    settings = {"format": form.name, "rename": dict(form.rename), "seq_len": seq_len}
    made_by = {
        "tokenizer": _tokenizer_hash(tokenizer),
        "transformers": transformers.__version__,
        "code": _code_hash(),
    }
    key = _hash(json.dumps([fingerprint, settings, made_by], sort_keys=True).encode())
    folder = cache_dir.absolute() / "tokens" / key
    try:
        if not (folder / "meta.json").is_file():
            _remove_stale(folder.parent, fingerprint)
            with StoreWriter(folder) as writer:
                for chunk in _encoded(source, form, Encoder(tokenizer, seq_len)):
                    writer.write(chunk)
                writer.finish(source=fingerprint, **settings, **made_by)
    except OSError as error:
        raise UserError(
            f"data.cache_dir={cache_dir}: the tokenised {source.name} cannot be written ({error}); make room, or set "
            "data.cache_dir to a folder with room"
        ) from error
    return TokenStore(folder)


class _Chunks(Dataset[list[Chunk] | UserError]):
    """Chunks of a source, encoded in whatever process asks; an error is a value, since it must reach the user as it is."""

    def __init__(self, source: Source, form: RowFormat, encoder: Encoder, chunks: list[Any]) -> None:
        self._chunks = chunks
        self._encode = partial(_encoded_chunk, source, form, encoder)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> list[Chunk] | UserError:
        try:
            return list(self._encode(self._chunks[number]))
        except UserError as error:
            return error


def _encoded(source: Source, form: RowFormat, encoder: Encoder) -> Iterator[Chunk]:
    chunks = source.chunks()
    processes = min(len(os.sched_getaffinity(0)), len(chunks))
    if processes < 2:
        for chunk in chunks:
            yield from _encoded_chunk(source, form, encoder, chunk)
        return
    loader = DataLoader(
        _Chunks(source, form, encoder, chunks),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=processes,
        worker_init_fn=_no_threads,
        generator=torch.Generator(),  # the global one stays as it is
    )
    for encoded in tqdm(loader, desc=f"tokenising {source.name}", disable=None):
        if isinstance(encoded, UserError):
            raise encoded
        yield from encoded


def _encoded_chunk(source: Source, form: RowFormat, encoder: Encoder, chunk: Any) -> Iterator[Chunk]:
    """A chunk of the source, in parts: a gzip file or a row group of a table may be large."""
    rows = (form(where, fields) for where, fields in source.read(chunk))
    try:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            yield make_chunk(encoder(some), len(some))
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read ({error}); make it readable") from error


def _as_it_is(encoded: Any) -> Any:
    return encoded


def _no_threads(worker: int) -> None:
    # One process a core is enough, and threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _remove_stale(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Removes stores of sources that changed or are gone, and what killed processes left behind."""
    for path in folder.glob("*/meta.json"):
        made_from = json.loads(path.read_text(encoding="utf-8"))["source"]
        changed = (
            all(made_from.get(key) == fingerprint.get(key) for key in PLACE) and made_from != fingerprint
        )
        if changed or ("mtime_ns" in made_from and not Path(made_from["path"]).exists()):
            shutil.rmtree(path.parent, ignore_errors=True)
    for path in folder.glob(f"{TEMPORARY}*"):
        if time.time() - path.stat().st_mtime > _DAY:
            shutil.rmtree(path, ignore_errors=True)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of the files that the tokenizer would be saved as, the chat template among them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return _hash(*(part for path in files for part in (path.name.encode(), path.read_bytes())))


def _code_hash() -> str:
    """Of the modules that decide what is in a store."""
    modules = (chat_template, encode, formats, sources, store)
    return _hash(*(inspect.getsource(module).encode() for module in modules))


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
