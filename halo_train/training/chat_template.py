"""A tokenizer's chat template: the text of a conversation, and which part of it the assistant wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import UserError
from .formats import Conversation, tool_name
from .store import Span

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = (
    "mark the assistant's text and the token that ends it with {% generation %} ... {% endgeneration %} in the "
    "chat_template.jinja of model.path, or use rows with prompt and completion"
)


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: several templates and no default among them.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            # A tokenizer may have a second template, for rows with tools.
            self._plain = tokenizer.get_chat_template()
            self._with_tools = tokenizer.get_chat_template(tools=[])
        except ValueError as error:
            raise UserError(f"the chat template of model.path: {error}") from None
        self._variables, self._eos = tokenizer.special_tokens_map, tokenizer.eos_token
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def turns(self, row: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of its characters that are the assistant's, one for each turn.

        Raises:
            UserError: the template refuses the conversation, leaves part of it out, or does not tell reliably which text
                is the assistant's.
        """
        marks = _GENERATION_TAG.search(self._source(row)) is not None
        text, marked = self._render(row, len(row.messages), marks=marks)
        _require_written(row, text)
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if marks and len(marked) != len(answers):
            raise UserError(
                f"{row.where}: the chat template marks {len(marked)} turns with {{% generation %}}, but the assistant has "
                f"{len(answers)}; mark each in the chat_template.jinja of model.path, or use rows with prompt and completion"
            )
        for i in answers:
            _require_calls_written(row, i, text)
        turns = marked if marks else [self._turn(row, i, text) for i in answers]
        for i, (start, end) in zip(answers, turns, strict=True):
            _require_calls_written(row, i, text[start:end])
        return text, turns

    def _turn(self, row: Conversation, index: int, text: str) -> Span:
        """Where assistant message ``index`` stands in ``text``: after what the model is given to write it.

        Some templates (Qwen3's) write more into the last turn than into those before; then the turn is its content, or
        else its tool calls, and what ends it. Others (Qwen3.5's, DeepSeek-R1's) give the start of a thought, which turns
        without one do not have; then a turn starts where its content follows the common part.
        """
        prompt, _ = self._render(row, index, prompt=True)
        before, _ = self._render(row, index)
        until, _ = self._render(row, index + 1)
        message = row.messages[index]
        content = message["content"].strip()
        if content and not text.startswith(prompt):
            same = next(
                (i for i, pair in enumerate(zip(prompt, text, strict=False)) if len(set(pair)) > 1), 0
            )
            if same > len(before) and text[same:].lstrip().startswith(content):
                prompt = prompt[:same]
        answer = until[len(prompt) :]
        if not text.startswith(until):
            answer = answer.removesuffix(self._eos)  # Phi-3's, written once at the end of all
        # Without a prompt of the template's own the answer must start at once: else its header would be trained.
        prompted = prompt != before or (
            answer.lstrip().startswith(content) if content else self._starts_at_once(row, index, prompt)
        )
        if text.startswith(prompt) and until.startswith(prompt) and prompted:
            if content:
                written = f"{re.escape(message['content'])}|{re.escape(content)}"
                starts = [0, *(match.start() for match in re.finditer(written, answer))]
            else:
                starts = [*range(answer.find(message["tool_calls"][0]["function"]["name"]) + 1)]
            for start in starts:
                if text.startswith(answer[start:], len(prompt)):
                    return len(prompt), len(prompt) + len(answer) - start
        raise UserError(
            f"{row.where}: the chat template does not tell reliably which text is the assistant's: message {index + 1} "
            "does not follow what add_generation_prompt gives, or is written in another way when others come after it; "
            f"{REMEDY}"
        )

    def _starts_at_once(self, row: Conversation, index: int, prompt: str) -> bool:
        """Whether an answer in words would follow ``prompt`` without a header."""
        answer = {"role": "assistant", "content": "answer"}
        until, _ = self._render(replace(row, messages=[*row.messages[:index], answer]), index + 1)
        return until[len(prompt) :].lstrip().startswith(answer["content"])

    def _source(self, row: Conversation) -> str:
        return self._plain if row.tools is None else self._with_tools

    def _render(
        self, row: Conversation, count: int, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """The first ``count`` messages, with the start of the assistant's turn if ``prompt``, and the marked spans."""
        try:
            texts, spans = render_jinja_template(
                [row.messages[:count]],
                tools=row.tools,
                chat_template=self._source(row),
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{row.where}: the chat template of model.path refuses the messages: {error}; change the row, or use rows "
                "with prompt and completion"
            ) from None
        return texts[0], _joined(spans[0]) if marks else []


def _require_written(row: Conversation, text: str) -> None:
    """That a template writes every content and every tool: those made for older models leave some roles or all tools out."""
    for message in row.messages:
        content = message["content"].strip()
        if not _is_in(content, text, as_json=message["role"] == "tool"):
            raise UserError(
                f"{row.where}: the chat template leaves out or changes what the {message['role']} says, {content!r:.60}; "
                "change the row, the chat_template.jinja of model.path, or use rows with prompt and completion"
            )
    for tool in row.tools or ():
        if tool_name(tool) not in text:
            raise UserError(
                f"{row.where}: the chat template does not write the tool {tool_name(tool)!r}; take one that supports tools, "
                "or describe them in a system message and remove 'tools'"
            )


def _require_calls_written(row: Conversation, index: int, turn: str) -> None:
    """That a text has each tool call of an assistant's turn with all arguments."""
    for call in row.messages[index].get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        for value in [name, *_leaves(arguments)]:
            if not _is_in(value, turn, as_json=True):
                raise UserError(
                    f"{row.where}: the chat template does not write the tool call {name!r} of message {index + 1} into the "
                    f"assistant's turn, or changes its {value!r:.60}; take one that supports tools, or write the call into "
                    "'content'"
                )


def _is_in(value: str, text: str, *, as_json: bool) -> bool:
    forms = [value]
    if as_json:
        forms += [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)]
    return any(form in text for form in forms)


def _leaves(value: Any) -> Iterator[str]:
    """The strings in an argument, and the names of its fields."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inside in value:
            yield from _leaves(inside)
    elif isinstance(value, str):
        yield value


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that follow each other without a gap as one: some templates (Phi-3's) mark a turn and its end apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined
