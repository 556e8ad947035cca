import ast
import json
import os
import sysconfig
from pathlib import Path

import pytest
import torch

from halo_train.training import stdlib_data
from halo_train.training.data import IGNORE, BatchStream, collate, fixed_batches, split_rows
from halo_train.training.encode import Example, encode_rows
from halo_train.training.errors import UserError
from halo_train.training.formats import Row
from halo_train.training.model import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(x): return x", "Adds one."], 300)


def test_loss_is_on_the_completion_and_its_end_only(tokenizer) -> None:
    rows = [Row("def add(x):", "Adds one."), Row(None, "Adds one.")]
    data = encode_rows(rows, tokenizer, 64, "data.train")
    ids, labels = collate(data.examples, tokenizer.pad_token_id)
    trained = [row[row != IGNORE].tolist() for row in labels]
    assert tokenizer.decode(trained[0]) == "Adds one.<|endoftext|>"
    # Of a text everything is trained but its first token, which nothing precedes.
    assert tokenizer.decode(ids[1][:1]) + tokenizer.decode(trained[1]) == "Adds one.<|endoftext|>"
    assert data.trained_tokens == sum(map(len, trained))
    assert ids.shape[1] % 16 == 0
    # The trained tokens stand where they are in the ids: the model does the shift.
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])


def test_rows_are_cut_and_dropped_at_seq_len(tokenizer) -> None:
    rows = [Row("x", "y" * 100), Row("p" * 100, "y"), Row("x", "y")]
    data = encode_rows(rows, tokenizer, 16, "data.train")
    assert (data.cut, data.dropped, len(data.examples)) == (2, 1, 2)
    assert max(len(example.ids) for example in data.examples) == 16
    assert "cut at seq_len: 2" in str(data)


def test_labels_stand_where_the_spans_are() -> None:
    ids, labels = collate([Example([1, 2, 3, 4, 5, 6], [(1, 2), (4, 6)]), Example([7, 8], [(1, 2)])], 0)
    assert ids.shape == labels.shape == (2, 16)
    assert labels[:, :6].tolist() == [[IGNORE, 2, IGNORE, IGNORE, 5, 6], [IGNORE, 8, *[IGNORE] * 4]]
    assert bool((labels[:, 6:] == IGNORE).all())


def test_nothing_to_train_on_is_an_error(tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"data\.train: none of the 1 rows has a token to train on.*seq_len=16"
    ):
        encode_rows([Row("p" * 100, "y")], tokenizer, 16, "data.train")


def test_split_is_a_partition_that_depends_on_the_seed() -> None:
    rows = [Row(None, str(i)) for i in range(50)]
    train, valid = split_rows(rows, 0.1, seed=0)
    assert len(valid) == 5
    assert sorted([*train, *valid], key=lambda row: int(row.completion)) == rows
    assert split_rows(rows, 0.1, seed=0)[1] == valid
    assert split_rows(rows, 0.1, seed=1)[1] != valid
    with pytest.raises(UserError, match="at least 2 rows"):
        split_rows(rows[:1], 0.1, seed=0)


def _examples(count: int) -> list[Example]:
    return [Example([i] * (2 + i % 7), [(1, 2 + i % 7)]) for i in range(count)]


def test_batches_cover_an_epoch_once_and_continue_from_a_position() -> None:
    stream = BatchStream(_examples(23), 4, pad_id=99, seed=3)
    batches = [next(stream)[0] for _ in range(15)]
    first = [int(row[0]) for ids in batches[:5] for row in ids]
    assert len(set(first)) == 20  # 5 batches of 4, the rest waits for the next epoch's order
    second = [int(row[0]) for ids in batches[5:10] for row in ids]
    assert first != second
    resumed = BatchStream(_examples(23), 4, pad_id=99, seed=3, position=7)
    for ids in batches[7:]:
        assert torch.equal(next(resumed)[0], ids)
    assert resumed.position == stream.position
    other = BatchStream(_examples(23), 4, pad_id=99, seed=4)
    assert [int(row[0]) for _ in range(5) for row in next(other)[0]] != first


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(UserError, match=r"micro_batch must be at most the number of training rows, 3; got 4"):
        BatchStream(_examples(3), 4, pad_id=0, seed=0)


def test_validation_batches_hold_every_row_once() -> None:
    batches = fixed_batches(_examples(10), 4, pad_id=99)
    assert [len(ids) for ids, _ in batches] == [4, 4, 2]
    assert sorted(int(row[0]) for ids, _ in batches for row in ids) == list(range(10))


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
