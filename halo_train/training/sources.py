"""Where rows come from: JSONL, plain or gzipped, parquet, or what the datasets library reads; in chunks, for several processes."""

from __future__ import annotations

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import HUB
from .errors import UserError

PLACE = ("path", "subset", "split")
"""Fields of a fingerprint that stay the same when the contents change."""

_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 2000

Fields = dict[str, Any]


class Source(ABC):
    """Rows of one file or data set.

    Attributes:
        name: for messages.
    """

    name: str

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells the source and its present contents from others; of its fields :data:`PLACE` name it."""

    @abstractmethod
    def chunks(self) -> list[Any]:
        """Parts of the source, in order, each of which :meth:`read` takes; small and picklable."""

    @abstractmethod
    def read(self, chunk: Any) -> Iterator[tuple[str, Fields]]:
        """``"<file>, line <n>"`` and the fields of each row of a chunk.

        Raises:
            UserError: something there is no row; names the place.
        """

    def rows(self) -> Iterator[tuple[str, Fields]]:
        """All rows in order, as :meth:`read`."""
        for chunk in self.chunks():
            yield from self.read(chunk)


def open_source(value: str, subset: str | None, split: str, field: str) -> Source:
    """The source that ``data.train`` or ``data.valid`` names.

    Args:
        value: a file ending in .jsonl, .json, .jsonl.gz or .parquet, a folder, or ``hf:`` and a name on the hub.
        subset, split: of a folder or a data set of the hub.
        field: that ``value`` is from, for messages.

    Raises:
        UserError: nothing there, or a CSV file; the package that reads it is not installed.
    """
    path = Path(value)
    if value.startswith(HUB) or path.is_dir():
        _need("datasets", value)
        return DatasetsSource(value, subset, split, field)
    if not path.is_file():
        raise UserError(
            f"data file {path} does not exist; set {field} to a JSONL or parquet file, or to {HUB}NAME for a data set "
            "of the Hugging Face hub"
        )
    if path.suffix == ".parquet":
        _need("pyarrow", value)
        return ParquetSource(path)
    if path.suffix in (".csv", ".tsv"):
        raise UserError(
            f"{path}: {path.suffix[1:].upper()} files are not read; write JSON lines, e.g. with pandas: "
            f"pandas.read_csv({path.name!r}).to_json({path.stem + '.jsonl'!r}, orient='records', lines=True)"
        )
    return GzipSource(path) if path.suffix == ".gz" else JsonlSource(path)


@dataclass(frozen=True)
class _File(Source):
    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.path)

    def fingerprint(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"path": str(self.path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


class JsonlSource(_File):
    """A JSON object a line; blank lines do not count. A chunk is (first byte, end, number of the first line)."""

    def chunks(self) -> list[tuple[int, int, int]]:
        chunks, start, line = [], 0, 1
        with self.path.open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                rest = file.readline()
                end = start + len(block) + len(rest)
                chunks.append((start, end, line))
                start, line = end, line + block.count(b"\n") + rest.count(b"\n")
        return chunks

    def read(self, chunk: tuple[int, int, int]) -> Iterator[tuple[str, Fields]]:
        start, end, line = chunk
        with self.path.open("rb") as file:
            file.seek(start)
            yield from _objects(file.read(end - start).split(b"\n"), line, self.name)


class GzipSource(_File):
    """As JsonlSource, compressed by gzip, which can only be read from its start: one chunk."""

    def chunks(self) -> list[None]:
        return [None]

    def read(self, chunk: None) -> Iterator[tuple[str, Fields]]:
        try:
            with gzip.open(self.path, "rb") as file:
                yield from _objects(file, 1, self.name)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{self.name}: not a whole gzip file ({error}); compress it again, or remove the .gz of a plain file"
            ) from None


class ParquetSource(_File):
    """A chunk is the number of a row group and of its first row."""

    def chunks(self) -> list[tuple[int, int]]:
        metadata = self._open().metadata
        chunks, first = [], 1
        for group in range(metadata.num_row_groups):
            chunks.append((group, first))
            first += metadata.row_group(group).num_rows
        return chunks

    def read(self, chunk: tuple[int, int]) -> Iterator[tuple[str, Fields]]:
        group, number = chunk
        for batch in self._open().iter_batches(_CHUNK_ROWS, row_groups=[group]):
            for fields in batch.to_pylist():
                yield f"{self.name}, row {number}", _given(fields)
                number += 1

    def _open(self) -> Any:
        from pyarrow import ArrowException, parquet

        try:
            return parquet.ParquetFile(self.path)
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{self.name}: not a parquet file ({error}); write it again, or name it .jsonl"
            ) from None


class DatasetsSource(Source):
    """A folder or a data set of the hub, by the datasets library. A chunk is (first row, end).

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, value: str, subset: str | None, split: str, field: str) -> None:
        import datasets

        self.name = f"{value} ({split})"
        self._place = {"path": value, "subset": subset, "split": split}
        saved = (Path(value) / "state.json").is_file() or (Path(value) / "dataset_dict.json").is_file()
        try:
            if saved:
                data = datasets.load_from_disk(value)
                self._data = data[split] if isinstance(data, datasets.DatasetDict) else data
            else:
                self._data = datasets.load_dataset(value.removeprefix(HUB), subset, split=split)
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"{field}: the datasets library cannot load {value}, data.subset={subset}, split {split}: {error}"
            ) from None

    def fingerprint(self) -> dict[str, Any]:
        return self._place | {"fingerprint": self._data._fingerprint}

    def chunks(self) -> list[tuple[int, int]]:
        rows = len(self._data)
        return [(start, min(start + _CHUNK_ROWS, rows)) for start in range(0, rows, _CHUNK_ROWS)]

    def read(self, chunk: tuple[int, int]) -> Iterator[tuple[str, Fields]]:
        columns = self._data[chunk[0] : chunk[1]]
        for number, values in enumerate(zip(*columns.values(), strict=True), start=chunk[0] + 1):
            yield f"{self.name}, row {number}", _given(dict(zip(columns, values, strict=True)))


def _given(value: Any) -> Any:
    """Without the fields that are null: in a table that is how a row leaves out what other rows have."""
    if isinstance(value, dict):
        return {key: _given(inside) for key, inside in value.items() if inside is not None}
    return [_given(inside) for inside in value] if isinstance(value, list) else value


def _need(package: str, name: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError:
        raise UserError(
            f"{name}: the package {package!r} is missing, which reads it; pip install 'halo_train[datasets]', or "
            "convert the data to JSONL"
        ) from None


def _objects(lines: Iterable[bytes], first: int, name: str) -> Iterator[tuple[str, Fields]]:
    for number, line in enumerate(lines, start=first):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _object(line, where)


def _object(line: bytes, where: str) -> Fields:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); {_encoding_remedy(line)}"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one complete JSON object"
        ) from None
    except _OccursTwice as error:
        raise UserError(
            f"{where}: the field {error.args[0]!r} occurs twice in one object; remove or rename one"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(
            f"{where}: cannot be read ({error}); remove the line or what is so large in it"
        ) from None
    if isinstance(row, list):
        raise UserError(
            f"{where}: must be a JSON object, but is a list; write each of its objects on a line of its own, e.g. with "
            "jq -c '.[]'"
        )
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: must be a JSON object such as {{"prompt": ..., "completion": ...}}; got {line.strip()[:60]!r}'
        )
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _OccursTwice(next(key for key in keys if keys.count(key) > 1))
    return fields


class _OccursTwice(ValueError):
    pass


def _encoding_remedy(line: bytes) -> str:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16; convert it, e.g. with iconv -f UTF-16 -t UTF-8"
    if line.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; let its name end in .gz"
    if line.startswith(b"PAR1"):
        return "it is parquet; let its name end in .parquet"
    return "save the file as UTF-8"
