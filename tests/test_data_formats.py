import json
from pathlib import Path

import pytest

from halo_train.training.errors import UserError
from halo_train.training.formats import Conversation, Row, read_rows

GOOD = '{"prompt": "p", "completion": "c"}'
TEXT = '{"text": "t"}'
ALPACA = '{"instruction": "i", "output": "o"}'
CHAT = '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'


def _file(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def _chat(*messages: object, **fields: object) -> str:
    return json.dumps({"messages": messages, **fields})


USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("good", "line", "message"),
    [
        (GOOD, '{"prompt": "p", "completion": "c"', "not valid JSON .*at column.*one complete JSON object"),
        (GOOD, '{"prompt": "p"}', "the field 'completion' is missing; the row has 'prompt'; add or rename"),
        (GOOD, '{"completion": "p"}', "the field 'prompt' is missing"),
        (GOOD, '{"question": "p"}', "the fields 'prompt' and 'completion' are missing; .*'question'"),
        (GOOD, "{}", ".*the row has no field"),
        (GOOD, '{"prompt": "p", "completion": 3}', "'completion' must be a string; got int 3"),
        (GOOD, '{"prompt": null, "completion": "c"}', "'prompt' must be a string; got NoneType"),
        (GOOD, '{"prompt": "p", "completion": ""}', "'completion' is empty"),
        (GOOD, '["p", "c"]', "must be a JSON object"),
        (GOOD, b'{"text": "\xff"}', "not UTF-8"),
        (GOOD, TEXT, "a row of format text, but by its first row the file is prompt_completion; .*split it"),
        (TEXT, CHAT, "a row of format messages, but by its first row the file is text"),
        (TEXT, '{"text": ""}', "'text' is empty"),
        (ALPACA, '{"instruction": "i", "input": "x"}', "the field 'output' is missing"),
        (ALPACA, '{"instruction": "", "output": "o"}', "'instruction' is empty"),
        (ALPACA, '{"instruction": "i", "input": 1, "output": "o"}', "'input' must be a string; got int 1"),
        (CHAT, '{"messages": "u"}', "'messages' must be a list of objects .*; got 'u'"),
        (CHAT, '{"messages": []}', r"'messages' must be a list of objects .*; got \[\]"),
        (CHAT, _chat(USER, "a"), "message 2 must be an object with 'role' and 'content'; got 'a'"),
        (CHAT, _chat(USER, {"role": "assistant"}), "message 2 must be an object with 'role' and 'content'"),
        (CHAT, _chat({"role": "usr", "content": "u"}), "message 1: 'role' must be .*did you mean 'user'"),
        (CHAT, _chat({"role": ["u"], "content": "u"}), "message 1: 'role' must be one of"),
        (CHAT, _chat(USER | {"content": ["u"]}), "message 1: 'content' must be a string; got list"),
        (CHAT, _chat(USER, ASSISTANT | {"content": ""}), "message 2: 'content' is empty"),
        (CHAT, _chat(USER), "no message of the assistant, so there is nothing to train on"),
        (CHAT, _chat(ASSISTANT, USER), "message 1 is the assistant's, with nothing to answer"),
        (CHAT, _chat(USER, ASSISTANT, tools=[{}]), "'tools' are not supported; describe them"),
        (CHAT, _chat(USER, ASSISTANT | {"tool_calls": [{}]}), "message 2: 'tool_calls' are not supported"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, good: str, line: str | bytes, message: str) -> None:
    path = _file(tmp_path, good, "", line, good)
    with pytest.raises(UserError, match=f"line 3: {message}") as error:
        read_rows(path)
    assert str(error.value).startswith(str(path))


def test_a_first_line_that_fits_no_format_or_several(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"line 1: needs 'messages', or 'prompt' and 'completion', or .*'text'; the row has 'q'",
    ):
        read_rows(_file(tmp_path, '{"q": 1}'))
    both = _file(tmp_path, '{"instruction": "i", "output": "o", "text": "t"}')
    with pytest.raises(UserError, match=r"line 1: .*alpaca or text; choose with data\.format=alpaca"):
        read_rows(both)
    assert read_rows(both, "text") == ([Row(None, "t")], "text")


def test_a_chosen_format_is_required_from_the_first_line_on(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"line 1: a row of format prompt_completion, but by data\.format .* text"
    ):
        read_rows(_file(tmp_path, GOOD), "text")


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl does not exist; set data\.train"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no rows"):
        read_rows(_file(tmp_path, "", "  "))


def test_good_rows(tmp_path: Path) -> None:
    path = _file(tmp_path, b"\xef\xbb\xbf" + GOOD.encode(), '{"prompt": "", "completion": "ü", "id": 7}')
    assert read_rows(path) == ([Row("p", "c"), Row("", "ü")], "prompt_completion")
    assert read_rows(_file(tmp_path, TEXT)) == ([Row(None, "t")], "text")
    path = _file(tmp_path, CHAT, CHAT)
    messages = [USER, ASSISTANT]
    expected = [Conversation(messages, f"{path}, line {number}") for number in (1, 2)]
    assert read_rows(path) == (expected, "messages")


def test_alpaca_rows_get_the_prompt_of_their_data_set(tmp_path: Path) -> None:
    with_input = '{"instruction": "Add {x}.", "input": "1 2", "output": "3"}'
    empty_input = '{"instruction": "i", "input": "", "output": "o"}'
    rows, form = read_rows(_file(tmp_path, ALPACA, with_input, empty_input))
    assert form == "alpaca"
    assert rows[0] == rows[2]
    assert [row.completion for row in rows if isinstance(row, Row)] == ["o", "3", "o"]
    bare, full = (row.prompt for row in rows[:2] if isinstance(row, Row))
    assert bare is not None
    assert bare.endswith("completes the request.\n\n### Instruction:\ni\n\n### Response:\n")
    assert full is not None
    assert full.endswith("\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "further context" in full
