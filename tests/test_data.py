import ast
import json
import multiprocessing
import os
import signal
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halo_train.training import stdlib_data
from halo_train.training.data import (
    IGNORE,
    Batch,
    BatchStream,
    FixedBatches,
    ShuffledBatches,
    Split,
    validation_rows,
)
from halo_train.training.encode import Encoder
from halo_train.training.errors import UserError
from halo_train.training.formats import Row
from halo_train.training.model import train_tokenizer
from halo_train.training.store import Documents, Example, StoreWriter, TokenStore, make_chunk


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(x): return x", "Adds one."], 300)


def _split(examples: list[Example], rows: int, **settings: int) -> Split:
    documents = Documents(make_chunk(examples, rows))
    return Split(documents, np.arange(rows), "data.train", **{"seq_len": 64, **settings})


def test_loss_is_on_the_completion_and_its_end_only(tokenizer) -> None:
    rows = [Row("def add(x):", "Adds one."), Row(None, "Adds one.")]
    split = _split(Encoder(tokenizer, 64)(rows), 2)
    batch = split.batch([0, 1], tokenizer.pad_token_id)
    ids, labels = batch.ids, batch.labels
    trained = [row[row != IGNORE].tolist() for row in labels]
    assert tokenizer.decode(trained[0]) == "Adds one.<|endoftext|>"
    # Of a text everything is trained but its first token, which nothing precedes.
    assert tokenizer.decode(ids[1][:1]) + tokenizer.decode(trained[1]) == "Adds one.<|endoftext|>"
    assert split.trained_tokens == batch.trained == sum(map(len, trained))
    assert ids.shape[1] % 16 == 0
    # The trained tokens stand where they are in the ids: the model does the shift.
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    assert batch.positions is None


def test_tokens_are_counted_by_length_also_where_padding_is_a_token_of_the_text(tokenizer) -> None:
    split = _split(Encoder(tokenizer, 64)([Row("x", "y"), Row("x", "y" * 9)]), 2)
    batch = split.batch([0, 1], pad_id=tokenizer.eos_token_id)
    assert batch.tokens == split.tokens == 3 + 11
    assert batch.trained == 2 + 10


def test_rows_are_cut_and_dropped_at_seq_len_and_texts_fall_into_pieces(tokenizer) -> None:
    rows = [Row("x", "y" * 100), Row("p" * 100, "y"), Row("x", "y")]
    split = _split(Encoder(tokenizer, 16)(rows), 3, seq_len=16)
    assert (split.cut, split.dropped, split.kept) == (1, 1, 2)
    assert split.rows.lengths.tolist() == [16, 3]
    assert "cut at seq_len: 1; dropped, without a trained token left: 1" in str(split)

    whole, pieces = (Encoder(tokenizer, n)([Row(None, "abcdefgh" * 5)]) for n in (64, 16))
    assert [token for piece in pieces for token in piece.ids] == whole[0].ids
    assert [len(piece.ids) for piece in pieces] == [16, len(whole[0].ids) - 16]
    assert all(piece.trained == [(1, len(piece.ids))] for piece in pieces)
    assert {(piece.row, piece.cut) for piece in pieces} == {(0, False)}


def test_labels_stand_where_the_spans_are() -> None:
    split = _split([Example([1, 2, 3, 4, 5, 6], [(1, 2), (4, 6)]), Example([7, 8], [(1, 2)], 1)], 2)
    batch = split.batch([0, 1], pad_id=0)
    assert batch.ids.shape == batch.labels.shape == (2, 16)
    assert batch.ids[:, :6].tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert batch.labels[:, :6].tolist() == [[IGNORE, 2, IGNORE, IGNORE, 5, 6], [IGNORE, 8, *[IGNORE] * 4]]
    assert bool((batch.labels[:, 6:] == IGNORE).all())


def test_a_store_reads_back_what_was_written(tmp_path: Path) -> None:
    examples = [Example([*range(n)], [(1, n)], row=i // 2, cut=i == 3) for i, n in enumerate((2, 5, 9, 3))]
    with StoreWriter(tmp_path / "store") as writer:
        writer.write(make_chunk(examples, 2))
        writer.write(make_chunk([], 3))  # rows without a trained token
        writer.write(make_chunk(examples[:1], 1))
        writer.finish(source="x")
    store = TokenStore(tmp_path / "store")
    assert store.rows == 6
    assert store.lengths().tolist() == [2, 5, 9, 3, 2]
    assert store.index["row"].tolist() == [0, 0, 1, 1, 5]
    assert store.index["cut"].tolist() == [False, False, False, True, False]
    assert store.index["trained"].tolist() == [1, 4, 8, 2, 1]
    assert store.document(2).tolist() == [~0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert store.document(4).tolist() == [~0, 1]


def test_a_store_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.write(make_chunk([Example([1, 2], [(1, 2)])], 1))
    assert not list(tmp_path.iterdir())


def test_nothing_to_train_on_is_an_error(tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"data\.train: none of the 1 rows has a token to train on.*seq_len=16"
    ):
        _split(Encoder(tokenizer, 16)([Row("p" * 100, "y")]), 1, seq_len=16)


def test_the_validation_rows_depend_on_the_seed() -> None:
    rows = validation_rows(50, 0.1, seed=0)
    assert len(set(rows.tolist())) == 5
    assert set(rows.tolist()) < set(range(50))
    assert np.array_equal(validation_rows(50, 0.1, seed=0), rows)
    assert not np.array_equal(validation_rows(50, 0.1, seed=1), rows)
    with pytest.raises(UserError, match="at least 2 rows"):
        validation_rows(1, 0.1, seed=0)


def _numbered(count: int, **settings: int) -> Split:
    """Document i is 2 to 8 times the token i."""
    return _split([Example([i] * (2 + i % 7), [(1, 2 + i % 7)], i) for i in range(count)], count, **settings)


def _first_column(batches: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.ids]


def test_batches_cover_an_epoch_once_and_depend_on_seed_and_number_alone() -> None:
    batches = ShuffledBatches(_numbered(23), 4, pad_id=99, seed=3)
    first = _first_column([batches[i] for i in range(5)])
    assert len(set(first)) == 20  # 5 batches of 4, the rest waits for the next epoch's order
    assert _first_column([batches[i] for i in range(5, 10)]) != first
    again = ShuffledBatches(_numbered(23), 4, pad_id=99, seed=3)
    for i in (12, 3, 7):
        assert torch.equal(again[i].ids, batches[i].ids)
    other = ShuffledBatches(_numbered(23), 4, pad_id=99, seed=4)
    assert _first_column([other[i] for i in range(5)]) != first


def test_batches_are_of_similar_lengths() -> None:
    """Windows of 16 batches are sorted: without, padding would be 0.8 of the tokens, with it half of that is rounding to 16."""
    lengths = np.random.default_rng(0).integers(2, 60, 400)
    split = _split([Example([1] * n, [(1, n)], i) for i, n in enumerate(lengths.tolist())], 400)
    batches = ShuffledBatches(split, 4, pad_id=0, seed=0)
    assert sum(batches[i].ids.numel() for i in range(100)) < 1.4 * lengths.sum()


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_continues_from_a_position(packing: bool) -> None:
    split = _numbered(23, packing=packing, seq_len=16)
    with BatchStream(split, 2, pad_id=99, seed=3) as stream:
        batches = [next(stream) for _ in range(15)]
        assert stream.position == 15
    with BatchStream(split, 2, pad_id=99, seed=3, position=7) as resumed:
        for batch in batches[7:]:
            other = next(resumed)
            assert torch.equal(other.ids, batch.ids)
            assert torch.equal(other.labels, batch.labels)
            assert (other.positions is None) is not packing
        assert resumed.position == 15
    with pytest.raises(ValueError, match="the stream is closed"):
        next(resumed)


def test_ranks_share_the_batches_and_a_position_holds_for_any_number_of_them() -> None:
    split = _numbered(23)
    expected = ShuffledBatches(split, 2, pad_id=99, seed=1)
    position = 0
    # Two steps on three ranks, then three steps on two.
    for world_size, steps in ((3, 2), (2, 3)):
        streams = [
            BatchStream(split, 2, 99, 1, position, rank=r, world_size=world_size) for r in range(world_size)
        ]
        for _ in range(steps):
            for rank, stream in enumerate(streams):
                assert torch.equal(next(stream).ids, expected[position + rank].ids)
            position += world_size
            assert {stream.position for stream in streams} == {position}
        for stream in streams:
            stream.__exit__(None, None, None)
    assert position == 12


def test_the_stream_leaves_the_random_numbers_of_the_run_alone() -> None:
    state = torch.get_rng_state()
    with BatchStream(_numbered(9), 2, 0, 0) as stream:
        next(stream)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_signal_to_the_whole_group_leaves_the_batches_coming() -> None:
    """As a job scheduler sends it; the run still has steps and a checkpoint to finish."""
    with BatchStream(_numbered(40), 2, 0, 0) as stream:
        next(stream)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
        for _ in range(10):
            next(stream)
        assert worker.is_alive()
    worker.join(10)
    assert not worker.is_alive()


def _stream_until_killed(connection: Any) -> None:
    with BatchStream(_numbered(40), 2, 0, 0) as stream:
        next(stream)
        (worker,) = multiprocessing.active_children()
        connection.send(worker.pid)
        time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_run_that_is_killed_leaves_no_process_behind(method: str) -> None:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    run = context.Process(target=_stream_until_killed, args=(theirs,))
    run.start()
    worker = ours.recv()
    os.kill(worker, 0)  # it is there
    run.kill()
    run.join()
    deadline = time.monotonic() + 20
    while _runs(worker):
        assert time.monotonic() < deadline, "the process that prepares batches outlives its run"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended; nobody has asked for its exit code


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(UserError, match=r"micro_batch must be at most the number of training rows, 3; got 4"):
        BatchStream(_numbered(3), 4, pad_id=0, seed=0)


def test_validation_batches_hold_every_row_once() -> None:
    batches = FixedBatches(_numbered(10), 4, pad_id=99)
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    assert sorted(_first_column(list(batches))) == list(range(10))


SOURCE = '''
def documented(x):
    """What this function does, in one line.

    And more.
    """
    return x + 1  # the comment stays

class C:
    async def method(self):
        "A docstring that stands in plain quotes."
        await self

    def bare(self): "A docstring on the line of its function."; return 1

    def only(self):
        """A docstring without any code after it."""

def twice(x):
    """What this function does, in one line."""
    return x
'''


def test_extraction_takes_the_docstring_out_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:")
    for excluded in ("test", "site-packages", "_vendor"):
        (tmp_path / excluded).mkdir()
        (tmp_path / excluded / "b.py").write_text(SOURCE.replace("function", excluded))
    assert stdlib_data.extract_pairs(tmp_path) == [
        {
            "prompt": "def documented(x):\n    return x + 1  # the comment stays\n",
            "completion": "What this function does, in one line.",
            "source": "a.py:2",
        },
        {
            "prompt": "async def method(self):\n    await self\n",
            "completion": "A docstring that stands in plain quotes.",
            "source": "a.py:10",
        },
    ]


def test_stdlib_pairs_are_many_and_distinct(tmp_path: Path) -> None:
    path = stdlib_data.stdlib_pairs_file(tmp_path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 2000
    for field in ("prompt", "completion"):
        assert len({row[field] for row in rows}) == len(rows)
    for row in rows[::50]:
        function = ast.parse(row["prompt"]).body[0]
        assert ast.get_docstring(function) is None
    assert not any("site-packages" in row["source"] or "/test/" in row["source"] for row in rows)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]  # no temporary left


def test_stdlib_pairs_do_not_depend_on_the_order_of_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(sysconfig.get_path("stdlib")) / "email"
    rows = stdlib_data.extract_pairs(root)
    assert len(rows) > 100
    walk = os.walk
    monkeypatch.setattr(
        stdlib_data.os, "walk", lambda top: ((d, s, f[::-1]) for d, s, f in list(walk(top))[::-1])
    )
    assert stdlib_data.extract_pairs(root) == rows


def test_the_cache_is_used_and_a_build_that_fails_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_data, "extract_pairs", lambda root: [])
    with pytest.raises(UserError, match="without the sources of its standard library"):
        stdlib_data.stdlib_pairs_file(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        stdlib_data, "extract_pairs", lambda root: [{"prompt": "p", "completion": "c", "source": "s"}]
    )
    path = stdlib_data.stdlib_pairs_file(tmp_path)
    monkeypatch.setattr(stdlib_data, "extract_pairs", lambda root: pytest.fail("the cache was not used"))
    assert stdlib_data.stdlib_pairs_file(tmp_path) == path
