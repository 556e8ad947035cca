"""Files and data sets as they lie on a disk -> the store of their tokens: the same rows whatever the container, flat memory, a cache."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_fixtures import halo_train, write_run

from halo_train.recipes import finetune
from halo_train.training import sources, tokenised
from halo_train.training.config import load_config
from halo_train.training.errors import UserError
from halo_train.training.formats import AUTO, Row, row_format
from halo_train.training.model import train_tokenizer
from halo_train.training.sources import open_source
from halo_train.training.store import TokenStore

ROWS = [{"prompt": f"p{i}", "completion": "c" * (i % 9 + 1)} for i in range(57)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["p1 c 2 3 4"], 300)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows are enough for several chunks, hence processes."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 200)
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 10)


def _jsonl(path: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(value: str | Path, **rename: str) -> list[object]:
    source = open_source(str(value), None, "train", "data.train")
    return list(tokenised.read_rows(source, row_format(source, AUTO, rename)))


def _store(path: Path, tokenizer: object, cache: Path, seq_len: int = 64) -> TokenStore:
    source = open_source(str(path), None, "train", "data.train")
    return tokenised.tokenised(source, row_format(source, AUTO, {}), tokenizer, seq_len, cache)


EXPECTED = [Row(str(row["prompt"]), str(row["completion"])) for row in ROWS]


def test_every_container_gives_the_same_rows(tmp_path: Path, small_chunks: None) -> None:
    datasets = pytest.importorskip("datasets")
    file = _jsonl(tmp_path / "rows.jsonl")
    assert _rows(file) == EXPECTED
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert _rows(packed) == EXPECTED

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet", batch_size=7)  # row groups
    assert len(open_source(str(tmp_path / "rows.parquet"), None, "train", "data.train").chunks()) == 9
    assert _rows(tmp_path / "rows.parquet") == EXPECTED
    table.save_to_disk(tmp_path / "saved")
    assert _rows(tmp_path / "saved") == EXPECTED
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "splits")
    assert _rows(tmp_path / "splits") == EXPECTED


def test_a_data_set_of_the_hub_is_asked_for_by_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments: object, **settings: object) -> object:
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf:openai/gsm8k", "main", "train[:1%]", "data.train")
    form = row_format(source, AUTO, {"question": "prompt", "answer": "completion"})
    assert [*tokenised.read_rows(source, form)] == [Row("q", "a")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:1%]"})]


def test_nulls_of_a_table_are_fields_that_a_row_does_not_have(tmp_path: Path) -> None:
    """A table has every field in every row; here the calls of one message and the arguments of two functions."""
    datasets = pytest.importorskip("datasets")
    calls = [{"function": {"name": n, "arguments": {n: "1"}}} for n in "fg"]
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "chat.parquet")
    (row,) = _rows(tmp_path / "chat.parquet")
    assert row.messages == messages  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl.gz", b'{"text": "t"}', "not a whole gzip file .*remove the .gz of a plain file"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "t"}\n' * 99)[:-9], "not a whole gzip file .*compress it again"),
        ("rows.parquet", b'{"text": "t"}', "not a parquet file .*name it .jsonl"),
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl.gz", gzip.compress(b"\n"), "has no rows"),
    ],
    ids=["not gzip", "gzip cut off", "not parquet", "empty", "empty gzip"],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        _rows(tmp_path / name)


def test_what_datasets_cannot_load_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        UserError, match=r"data\.train: the datasets library cannot load .*nothing.*split train"
    ):
        _rows(tmp_path / "nothing")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for value in (str(tmp_path / "rows.parquet"), "hf:openai/gsm8k"):
        with pytest.raises(UserError, match=r"package .* is missing.*pip install 'halo_train\[datasets\]'"):
            open_source(value, None, "train", "data.train")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"], ids=["LF", "CRLF", "empty lines"])
def test_chunks_meet_at_lines_and_keep_their_numbers(
    tmp_path: Path, small_chunks: None, newline: str
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_bytes(newline.join(lines).encode())  # no newline at the end
    source = open_source(str(path), None, "train", "data.train")
    assert len(source.chunks()) > 5
    found = list(source.rows())
    assert [fields for _, fields in found] == ROWS
    step = newline.count("\n")
    assert [where for where, _ in found] == [f"{path}, line {1 + step * i}" for i in range(len(ROWS))]


def test_several_processes_write_the_store_of_one(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _jsonl(tmp_path / "rows.jsonl")
    one = _store(path, tokenizer, tmp_path / "one")
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 200)
    monkeypatch.setattr(tokenised.os, "sched_getaffinity", lambda _: {0, 1, 2})
    state = torch.get_rng_state()
    three = _store(path, tokenizer, tmp_path / "three")
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(one.index, three.index)
    assert one.rows == three.rows == len(ROWS)
    for number in range(len(one.index)):
        assert np.array_equal(one.document(number), three.document(number))


def test_a_file_in_one_chunk_is_encoded_in_parts(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gzip file has no middle to start from, but must not be in memory as a whole."""
    path = _jsonl(tmp_path / "rows.jsonl")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(tokenised, "_ROWS_AT_ONCE", 10)
    source = open_source(str(packed), None, "train", "data.train")
    encoder = tokenised.Encoder(tokenizer, 64)
    parts = list(tokenised._encoded(source, row_format(source, AUTO, {}), encoder))
    assert [part.rows for part in parts] == [10] * 5 + [7]
    one, other = (_store(file, tokenizer, tmp_path / "cache") for file in (path, packed))
    assert np.array_equal(one.index, other.index)
    assert one.digest == other.digest


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _jsonl(tmp_path / "rows.jsonl")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .*Permission denied.*make it readable"):
        _rows(path)


def test_the_first_bad_line_is_named_whichever_process_finds_it(
    tmp_path: Path, tokenizer: object, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenised.os, "sched_getaffinity", lambda _: {0, 1})
    bad = [{"prompt": "p"}]
    path = _jsonl(tmp_path / "rows.jsonl", ROWS[:30] + bad + ROWS[:20] + bad)
    with pytest.raises(UserError, match=rf"^{path}, line 31: the field 'completion' is missing") as error:
        _store(path, tokenizer, tmp_path / "cache")
    assert "Traceback" not in str(error.value)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_store_is_used_again_until_file_tokenizer_or_settings_change(
    tmp_path: Path, tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = _jsonl(tmp_path / "rows.jsonl"), tmp_path / "cache"
    first = _store(path, tokenizer, cache)
    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "_encoded", lambda *_: pytest.fail("the store was not used"))
        assert np.array_equal(_store(path, tokenizer, cache).index, first.index)
    other = train_tokenizer(["cccc cccc"], 300)
    assert not np.array_equal(_store(path, other, cache).lengths(), first.lengths())
    assert _store(path, tokenizer, cache, seq_len=16).lengths().max() <= 16
    stores = {folder.name for folder in (cache / "tokens").iterdir()}
    assert len(stores) == 3

    # Of the file as it was nothing is kept; other files keep theirs.
    _store(_jsonl(tmp_path / "other.jsonl", ROWS[:5]), tokenizer, cache)
    _jsonl(path, ROWS[:9])
    assert _store(path, tokenizer, cache).rows == 9
    kept = {folder.name for folder in (cache / "tokens").iterdir()}
    assert len(kept) == 2
    assert not kept & stores


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path, tokenizer: object) -> None:
    tokens = tmp_path / "tokens"
    for name, age in ((".writing-old", 2 * 86400), (".writing-new", 60)):
        (tokens / name).mkdir(parents=True)
        then = (tokens / name).stat().st_mtime - age
        tokenised.os.utime(tokens / name, (then, then))
    _store(_jsonl(tmp_path / "rows.jsonl"), tokenizer, tmp_path)
    assert not (tokens / ".writing-old").exists()
    assert (tokens / ".writing-new").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"data\.cache_dir=.*cannot be written .*set data\.cache_dir to a folder"
    ):
        _store(_jsonl(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "file")


MEASURE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from halo_train.training.data import BatchStream, Split
from halo_train.training.formats import row_format
from halo_train.training.sources import open_source
from halo_train.training.tokenised import tokenised
import numpy as np

file, tokenizer, cache = sys.argv[1:]
source = open_source(file, None, "train", "data.train")
store = tokenised(source, row_format(source, "auto", {}), AutoTokenizer.from_pretrained(tokenizer), 128, Path(cache))
with BatchStream(Split(store, np.arange(store.rows), "data.train", seq_len=128, packing=True), 4, 0, 0) as stream:
    for _ in range(20):
        next(stream)
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer) -> None:
    """A file eight times as large: its 8 million tokens more as a list of int would take 64 MB, as int32 32 MB."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": "".join(chr(97 + (i * j) % 26) for j in range(150))}) for i in range(2000)]
    peaks = []
    for times in (4, 32):
        file = tmp_path / f"{times}.jsonl"
        file.write_text("\n".join(lines * times))
        arguments = [
            sys.executable,
            "-c",
            MEASURE,
            str(file),
            str(tmp_path / "tokenizer"),
            str(tmp_path / "cache"),
        ]
        peaks.append(int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 25, peaks


def test_rows_of_the_run_come_through_rename_parquet_and_a_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_run(tmp_path)
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(tmp_path / "qa")
    renamed = ["data.rename.question=prompt", "data.rename.answer=completion"]
    place = [f"data.train={tmp_path / 'qa'}", f"data.valid={tmp_path / 'qa'}", "data.valid_split=test"]
    assert halo_train("preprocess", str(file), *renamed, *place) == 0
    out = capsys.readouterr().out
    assert "57 rows of" in out
    assert "validation data: 5 rows" in out
    config = load_config(file, [*renamed, *place])
    assert load_config(_yaml(tmp_path, config.to_yaml())) == config
    data = finetune.load_data(config, tmp_path / "run")
    assert (data.train.kept, len(data.valid)) == (57, 2)


def _yaml(folder: Path, text: str) -> Path:
    path = folder / "again.yaml"
    path.write_text(text)
    return path
