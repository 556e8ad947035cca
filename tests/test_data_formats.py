import gzip
import json
from pathlib import Path

import pytest

from halo_train.training.errors import UserError
from halo_train.training.formats import AUTO, Conversation, Row, row_format
from halo_train.training.sources import open_source
from halo_train.training.tokenised import read_rows as rows_of

GOOD = '{"prompt": "p", "completion": "c"}'
TEXT = '{"text": "t"}'
ALPACA = '{"instruction": "i", "output": "o"}'
CHAT = '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'


def _file(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def read_rows(path: Path, wanted: str = AUTO, **rename: str) -> tuple[list[Row | Conversation], str]:
    """All rows and the format."""
    source = open_source(str(path), None, "train", "data.train")
    form = row_format(source, wanted, rename)
    return list(rows_of(source, form)), form.name


def _chat(*messages: object, **fields: object) -> str:
    return json.dumps({"messages": messages, **fields})


def _call(name: str, arguments: object = None) -> dict[str, object]:
    return {"function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("good", "line", "message"),
    [
        (GOOD, '{"prompt": "p", "completion": "c"', "not valid JSON .*at column.*one complete JSON object"),
        (
            GOOD,
            '{"prompt": "p"}',
            "the field 'completion' is missing; the row has 'prompt'; add fields, or rename",
        ),
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
        (CHAT, _chat(USER, ASSISTANT, tools=[{}]), "'tools' must be a list of JSON schemas .* with a name"),
        (CHAT, _chat(USER, ASSISTANT, tools="{"), "'tools' must be a list of JSON schemas"),
        (CHAT, _chat(USER, ASSISTANT | {"tool_calls": [{}]}), "message 2: a tool call must be"),
        (CHAT, _chat(USER, ASSISTANT | {"tool_calls": {"a": 1}}), "message 2: 'tool_calls' must be a list"),
        (CHAT, _chat(USER | {"tool_calls": [_call("f")]}, ASSISTANT), "message 1: .*; got .* from the user"),
        (
            CHAT,
            _chat(USER, {"role": "assistant", "tool_calls": [_call("f", "[1]")]}),
            "message 2: the arguments of .*'f' must be an obj",
        ),
        # Not seen by a look at the fields.
        (GOOD, '{"prompt": "p", "prompt": "q", "completion": "c"}', "the field 'prompt' occurs twice"),
        (
            GOOD,
            r'{"prompt": "p", "completion": "\ud83d"}',
            "'completion' has half of a surrogate pair at character 0",
        ),
        (GOOD, '{"prompt": "p", "completion": ' + "9" * 5000 + "}", "cannot be read .*4300"),
        (GOOD, "[" * 100_000, "cannot be read "),
        (GOOD, '{"prompt": "p", "completion": "c"} {"prompt"', "not valid JSON .Extra data at column 36"),
        (
            GOOD,
            '[{"prompt": "p", "completion": "c"}]',
            "must be a JSON object, but is a list; write each of its objects on a line of its own",
        ),
        (GOOD, '"p"', "must be a JSON object such as"),
        (GOOD, b"\x00\x00\x00", "not valid JSON"),
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD.encode("utf-16"), "line 1: not UTF-8 .*it is UTF-16; convert it"),
        (gzip.compress(GOOD.encode()), "line 1: not UTF-8 .*compressed by gzip; let its name end in .gz"),
        (b"PAR1\xff\xfe", "line 1: not UTF-8 .*let its name end in .parquet"),
        ("[\n  " + GOOD + "\n]", "line 1: not valid JSON .*each line must be one complete JSON object"),
    ],
    ids=["UTF-16", "gzip", "parquet", "one JSON array"],
)
def test_a_file_that_is_no_jsonl(tmp_path: Path, data: bytes | str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_windows_lines_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    mark = b"\xef\xbb\xbf"
    path.write_bytes(b"\r\n".join([mark + GOOD.encode(), b"", mark + GOOD.encode(), b'{"prompt": 1}']))
    with pytest.raises(UserError, match="line 4: the field 'completion' is missing"):
        read_rows(path)
    path.write_bytes(path.read_bytes().replace(b'{"prompt": 1}', b""))
    assert read_rows(path)[0] == [Row("p", "c")] * 2


def test_fields_are_renamed_first(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"question": "q", "answer": "a", "text": "t"}')
    assert read_rows(path, "text", answer="text") == ([Row(None, "a")], "text")
    with pytest.raises(UserError, match=r"line 1: the row could be prompt_completion or text"):
        read_rows(path, question="prompt", answer="completion")
    with pytest.raises(
        UserError, match=r"line 1: data\.rename names the field 'reply', but the row has 'question'"
    ):
        read_rows(path, reply="completion")


def test_tool_calls_get_one_form(tmp_path: Path) -> None:
    """OpenAI's API has no content beside calls and writes arguments as JSON, which a template would quote again."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"id": "1", "type": "function", **_call("f", '{"x": "1"}')}
    answer = {"role": "tool", "tool_call_id": "1", "content": "2"}
    row = _chat(
        USER, {"role": "assistant", "content": None, "tool_calls": [call]}, answer, ASSISTANT, tools=tools
    )
    ((conversation,), _) = read_rows(_file(tmp_path, row))
    assert isinstance(conversation, Conversation)
    assert conversation.tools == tools
    assert conversation.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call | _call("f", {"x": "1"})],
    }
    assert conversation.messages[2:] == [answer, ASSISTANT]
    ((with_text,), _) = read_rows(_file(tmp_path, _chat(USER, ASSISTANT, tools=json.dumps(tools))))
    assert isinstance(with_text, Conversation)
    assert with_text.tools == tools


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
