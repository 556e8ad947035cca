"""Fields of a row: messages, prompt and completion, Alpaca's fields or text. Every fault with its file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halo_train.config import did_you_mean

from .errors import UserError
from .sources import Source

FORMATS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Values of ``data.format`` and the fields that each of their rows must have; other fields are ignored."""

AUTO = "auto"
"""Value of ``data.format`` that means the format of a file's first row."""

_RENAME = "add fields, or rename them, e.g. data.rename.question=prompt data.rename.answer=completion"

ROLES = ("system", "user", "assistant", "tool")

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
    """Messages ``{"role": ..., "content": ...}``, the first not the assistant's, at least one the assistant's.

    The assistant's may have ``tool_calls``, ``[{"function": {"name": ..., "arguments": {...}}}]`` and more, and an empty
    content then.
    """

    messages: list[dict[str, Any]]
    where: str
    """File and line, for what only the chat template finds out."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that may be called."""

    @property
    def texts(self) -> list[str]:
        """As :attr:`Row.texts`."""
        calls = [message["tool_calls"] for message in self.messages if message.get("tool_calls")]
        return [message["content"] for message in self.messages] + ([json.dumps(calls)] if calls else [])


@dataclass(frozen=True)
class RowFormat:
    """How the fields of a file's rows become what is trained on; one format for the whole file.

    Args:
        name: a key of :data:`FORMATS`.
        chosen_by: for messages.
        rename: of fields, before anything else.
    """

    name: str
    chosen_by: str
    rename: Mapping[str, str]

    def __call__(self, where: str, fields: Mapping[str, Any]) -> Row | Conversation:
        """A row from its fields.

        Raises:
            UserError: the row is of another format, lacks a field or has one of the wrong type.
        """
        row = _renamed(fields, self.rename, where)
        _require_format(row, self.name, where, self.chosen_by)
        return _row(row, self.name, where)


def row_format(source: Source, wanted: str, rename: Mapping[str, str]) -> RowFormat:
    """The format of a source.

    Args:
        wanted: a key of :data:`FORMATS`, or :data:`AUTO` for that of the first row.
        rename: ``data.rename``.

    Raises:
        UserError: not readable, no row, or a first row of no format or several.
    """
    try:
        first = next(source.rows(), None)
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read ({error}); make it readable") from error
    if first is None:
        raise UserError(f"data file {source.name} has no rows; each line must be a JSON object")
    if wanted != AUTO:
        return RowFormat(wanted, "data.format", rename)
    where, fields = first
    return RowFormat(_format_of(_renamed(fields, rename, where), where), "its first row", rename)


def _renamed(fields: Mapping[str, Any], rename: Mapping[str, str], where: str) -> dict[str, Any]:
    for old in rename:
        if old not in fields:
            raise UserError(f"{where}: data.rename names the field {old!r}, but {_has(fields)}")
    kept = {key: value for key, value in fields.items() if key not in rename}
    return kept | {new: fields[old] for old, new in rename.items()}


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
        raise UserError(f"{where}: needs {needed}; {_has(row)}; {_RENAME}")
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
    raise UserError(f"{where}: the {noun.format(' and '.join(missing))} missing; {_has(row)}; {_RENAME}")


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
    messages = [
        _message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)
    ]
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise UserError(
            f"{where}: message 1 is the assistant's, with nothing to answer; put a user message before it"
        )
    if "assistant" not in roles:
        raise UserError(
            f"{where}: no message of the assistant, so there is nothing to train on; remove the line or add the answer"
        )
    return Conversation(messages, where, _tools(row.get("tools"), where))


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with a content and the arguments of its calls as objects."""
    needs = f"{where} must be an object with 'role' and 'content'; got {message!r:.60}"
    if not isinstance(message, dict):
        raise UserError(needs)
    # A table fills the fields that only other messages have with null, and OpenAI's API the content of a call.
    message = {key: value for key, value in message.items() if value is not None or key == "role"}
    calls = message.pop("tool_calls", None)
    if "role" not in message or ("content" not in message and not calls):
        raise UserError(needs)
    role = message["role"]
    if role not in ROLES:
        raise UserError(
            f"{where}: 'role' must be one of {', '.join(ROLES)}; got {role!r}{did_you_mean(str(role), ROLES)}"
        )
    message.setdefault("content", "")
    _string(message, "content", where, may_be_empty=role != "assistant" or bool(calls))
    if not calls:
        return message
    if role != "assistant" or not isinstance(calls, list):
        raise UserError(
            f"{where}: 'tool_calls' must be a list in a message of the assistant; got {calls!r:.60} from the {role}"
        )
    return message | {"tool_calls": [_tool_call(call, where) for call in calls]}


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(
            f'{where}: a tool call must be {{"function": {{"name": ..., "arguments": {{...}}}}}}; got {call!r:.60}'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's API writes them as JSON; templates would quote that once more
        arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: the arguments of the call of {function['name']!r} must be an object, or one as a JSON string; got "
            f"{function['arguments']!r:.60}"
        )
    return call | {"function": function | {"arguments": arguments}}


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = _parsed(tools)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in tools):
        raise UserError(
            f"{where}: 'tools' must be a list of JSON schemas of functions, each with a name; got {tools!r:.60}"
        )
    return tools


def tool_name(tool: Mapping[str, Any]) -> Any:
    """Of a function's schema, which stands under ``function`` or bare; None if it has no name."""
    inside = tool.get("function", tool)
    return inside.get("name") if isinstance(inside, Mapping) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _string(row: Mapping[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {field!r} must be a string; got {type(value).__name__} {value!r:.60}; put it in quotes"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {field!r} has half of a surrogate pair at character {error.start}, e.g. of an emoji that was cut in "
            "two; remove it or write the character whole"
        ) from None
    if not value and not may_be_empty:
        raise UserError(
            f"{where}: {field!r} is empty, so there is nothing to train on; remove the line or fill the field"
        )
    return value
