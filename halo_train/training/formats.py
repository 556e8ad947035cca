"""Rows of a JSONL file: messages, prompt and completion, Alpaca's fields or text. Every fault with its file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo_train.config import did_you_mean

from .errors import UserError

FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Values of ``data.format`` and the fields that each of their rows must have; other fields are ignored."""

AUTO = "auto"
"""Value of ``data.format`` that means the format of a file's first row."""

ROLES = ("system", "user", "assistant")

_ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
_ALPACA_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""
# Both prompts: github.com/tatsu-lab/stanford_alpaca, which every model trained on such data knows.


@dataclass(frozen=True)
class Row:
    """A prompt and what follows it. ``prompt`` is None for a ``text`` row, all of which is trained."""

    prompt: str | None
    completion: str

    @property
    def texts(self) -> list[str]:
        """What the row is made of, for the training of a tokenizer."""
        return [self.prompt or "", self.completion]


@dataclass(frozen=True)
class Conversation:
    """Messages ``{"role": ..., "content": ...}``, the first not the assistant's, at least one the assistant's."""

    messages: list[dict[str, Any]]
    where: str
    """File and line, for what only the chat template finds out."""

    @property
    def texts(self) -> list[str]:
        """As :attr:`Row.texts`."""
        return [message["content"] for message in self.messages]


def read_rows(path: Path, wanted: str = AUTO) -> tuple[list[Row | Conversation], str]:
    """Rows of a JSONL file and their format, one for the whole file.

    Args:
        wanted: a key of :data:`FORMATS`, or :data:`AUTO`.

    Raises:
        UserError: no such file, no row, or a line that is no JSON object, is of another format, lacks a field or has
            one of the wrong type; names the file and the line.
    """
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; set data.train or data.valid to a JSONL file")
    rows: list[Row | Conversation] = []
    chosen = wanted
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            fields = _object(line, where)
            if chosen == AUTO:
                chosen = _format_of(fields, where)
            _require_format(fields, chosen, where, "its first row" if wanted == AUTO else "data.format")
            rows.append(_row(fields, chosen, where))
    if not rows:
        raise UserError(f"data file {path} has no rows; each line must be a JSON object")
    return rows, chosen


def _object(line: bytes, where: str) -> dict[str, Any]:
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
    return row


def _fitting(row: Mapping[str, Any]) -> list[str]:
    return [name for name, fields in FORMATS.items() if all(field in row for field in fields)]


def _format_of(row: Mapping[str, Any], where: str) -> str:
    fitting = _fitting(row)
    if len(fitting) > 1:
        raise UserError(
            f"{where}: the row could be {' or '.join(fitting)}; choose with data.format={fitting[0]}"
        )
    if not fitting:
        needed = ", or ".join(" and ".join(map(repr, fields)) for fields in FORMATS.values())
        raise UserError(f"{where}: needs {needed}; {_has(row)}; add or rename fields")
    return fitting[0]


def _require_format(row: Mapping[str, Any], chosen: str, where: str, chosen_by: str) -> None:
    missing = [repr(field) for field in FORMATS[chosen] if field not in row]
    if not missing:
        return
    other = _fitting(row)
    if other:
        raise UserError(
            f"{where}: a row of format {other[0]}, but by {chosen_by} the file is {chosen}; a file must hold one format: "
            "convert its rows, or split it and set data.format"
        )
    noun = "field {} is" if len(missing) == 1 else "fields {} are"
    raise UserError(
        f"{where}: the {noun.format(' and '.join(missing))} missing; {_has(row)}; add or rename fields"
    )


def _has(row: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no field'}"


def _row(row: Mapping[str, Any], chosen: str, where: str) -> Row | Conversation:
    if chosen == "messages":
        return _conversation(row, where)
    if chosen == "text":
        return Row(None, _string(row, "text", where))
    if chosen == "prompt_completion":
        return Row(_string(row, "prompt", where, may_be_empty=True), _string(row, "completion", where))
    instruction = _string(row, "instruction", where)
    context = _string(row, "input", where, may_be_empty=True) if "input" in row else ""
    template = _ALPACA_WITH_INPUT if context else _ALPACA
    return Row(template.format(instruction=instruction, input=context), _string(row, "output", where))


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content'; got {messages!r:.60}"
        )
    if row.get("tools"):
        raise UserError(
            f"{where}: 'tools' are not supported; describe them in a system message and remove the field"
        )
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"{where}: message {number}")
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise UserError(
            f"{where}: message 1 is the assistant's, with nothing to answer; put a user message before it"
        )
    if "assistant" not in roles:
        raise UserError(
            f"{where}: no message of the assistant, so there is nothing to train on; remove the line or add the answer"
        )
    return Conversation(messages, where)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"{where} must be an object with 'role' and 'content'; got {message!r:.60}")
    role = message["role"]
    if role not in ROLES:
        raise UserError(
            f"{where}: 'role' must be one of {', '.join(ROLES)}; got {role!r}{did_you_mean(str(role), ROLES)}"
        )
    if message.get("tool_calls"):
        raise UserError(
            f"{where}: 'tool_calls' are not supported; write the call into 'content' and remove the field"
        )
    _string(message, "content", where, may_be_empty=role != "assistant")


def _string(row: Mapping[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
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
