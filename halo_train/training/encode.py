"""Rows -> token ids, and which of them carry loss: completions, texts, or the assistant's turns of a conversation."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .errors import UserError
from .formats import Conversation, Row

Span = tuple[int, int]
"""Start and end (exclusive)."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "mark the assistant's text and the token that ends it with {% generation %} ... {% endgeneration %} in the "
    "chat_template.jinja of model.path, or use rows with prompt and completion"
)


@dataclass(frozen=True)
class Example:
    """Token ids of one row, and the spans of them that carry loss: in order, never the first token."""

    ids: list[int]
    trained: list[Span]


@dataclass(frozen=True)
class Dataset:
    """Examples and what the mask and the cut to ``seq_len`` left of them."""

    examples: list[Example]
    tokens: int
    trained_tokens: int
    cut: int
    """Rows that were longer than seq_len."""
    dropped: int
    """Rows of which no trained token was left after the cut."""

    def __str__(self) -> str:
        share = 100 * self.trained_tokens / self.tokens
        text = f"{len(self.examples)} rows, {self.tokens} tokens, {share:.1f}% of them trained"
        if self.cut:
            text += f"; cut at seq_len: {self.cut}"
        if self.dropped:
            text += f"; dropped, because the completion starts after seq_len: {self.dropped}"
        return text


def encode_rows(rows: Sequence[Row | Conversation], tokenizer: Any, seq_len: int, name: str) -> Dataset:
    """Token ids with the loss on completions (and their end-of-text token) or assistant turns (and their end) only.

    Args:
        rows: at least one, all of one class.
        tokenizer: of transformers, with an eos token.
        seq_len: tokens; longer rows are cut at their end.
        name: of the config field, for messages.

    Raises:
        UserError: no eos token; no trained token in the whole file; no chat template, or one that does not tell reliably
            which tokens are the assistant's.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer in model.path has no eos_token, so a model cannot learn where a completion ends; add one to "
            "its tokenizer_config.json"
        )
    conversations = [row for row in rows if isinstance(row, Conversation)]
    pairs = [row for row in rows if isinstance(row, Row)]
    whole = (
        _encode_conversations(conversations, tokenizer) if conversations else _encode_pairs(pairs, tokenizer)
    )
    examples = [cut for example in whole if (cut := _cut(example, seq_len)).trained]
    tokens = sum(len(example.ids) for example in examples)
    trained = sum(end - start for example in examples for start, end in example.trained)
    if trained == 0:
        raise UserError(
            f"{name}: none of the {len(rows)} rows has a token to train on within data.seq_len={seq_len}; raise "
            "data.seq_len or shorten the prompts"
        )
    longer = sum(len(example.ids) > seq_len for example in whole)
    return Dataset(examples, tokens, trained, longer, len(rows) - len(examples))


def decode_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of an example in order, special tokens included, and of each piece whether it is trained."""
    pieces, done = [], 0
    for start, end in [*example.trained, (len(example.ids), len(example.ids))]:
        pieces += [(example.ids[done:start], False), (example.ids[start:end], True)]
        done = end
    return [
        (tokenizer.decode(ids, clean_up_tokenization_spaces=False), trained) for ids, trained in pieces if ids
    ]


def _cut(example: Example, seq_len: int) -> Example:
    trained = [(start, min(end, seq_len)) for start, end in example.trained if start < seq_len]
    return Example(example.ids[:seq_len], trained)


def _encode_pairs(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """Prompt and completion are tokenised apart, so the mask ends exactly where the completion starts."""
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    prompts = _token_ids(tokenizer, [row.prompt or "" for row in rows])
    completions = _token_ids(tokenizer, [row.completion for row in rows])
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        ids = start + prompt + completion + [tokenizer.eos_token_id]
        # The first token of a text has nothing before it to be predicted from.
        masked = max(1, len(start) + len(prompt)) if row.prompt is not None else 1
        examples.append(Example(ids, [(masked, len(ids))]))
    return examples


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _encode_conversations(rows: Sequence[Conversation], tokenizer: Any) -> list[Example]:
    """Conversations as the chat template writes them; the loss is on each assistant turn and the token that ends it.

    The text is tokenised whole, as the model will see it; a token belongs to a turn when they share a character.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer in model.path has no chat template, which messages need; take the directory of a chat model, "
            "put a chat_template.jinja beside the tokenizer, or use rows with prompt and completion"
        )
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer in model.path does not tell which text a token stands for, so messages cannot be masked; "
            "give it a tokenizer.json, or use rows with prompt and completion"
        )
    template = _Template(tokenizer)
    rendered = [template.turns(row) for row in rows]
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
    examples = []
    for row, (_, turns), ids, offsets in zip(
        rows, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        spans = [(max(1, bisect_right(ends, start)), bisect_left(starts, end)) for start, end in turns]
        for start, end in spans:
            if template.special_ids.isdisjoint(ids[start:end]):
                raise UserError(
                    f"{row.where}: the chat template ends the assistant's turn without a special token, or leaves it out "
                    f"of {{% generation %}}, so a model cannot learn where to stop; {_REMEDY}"
                )
        examples.append(Example(ids, spans))
    return examples


class _Template:
    """The chat template of a tokenizer.

    Raises:
        UserError: several templates and no default among them.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(f"the chat template of model.path: {error}") from None
        self._marks = _GENERATION_TAG.search(self._source) is not None
        self._variables = tokenizer.special_tokens_map
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def turns(self, row: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of its characters that are the assistant's, one for each turn.

        Raises:
            UserError: the template refuses the conversation, leaves part of it out, or does not tell reliably which text
                is the assistant's.
        """
        text, marked = self._render(row, len(row.messages), marks=self._marks)
        for message in row.messages:
            if message["content"].strip() not in text:
                raise UserError(
                    f"{row.where}: the chat template leaves out or changes what the {message['role']} says, "
                    f"{message['content'].strip()!r:.60}; change the row, the chat_template.jinja of model.path, or use "
                    "rows with prompt and completion"
                )
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if not self._marks:
            return text, [self._turn(row, i, text) for i in answers]
        if len(marked) != len(answers):
            raise UserError(
                f"{row.where}: the chat template marks {len(marked)} turns with {{% generation %}}, but the assistant has "
                f"{len(answers)}; mark each in the chat_template.jinja of model.path, or use rows with prompt and completion"
            )
        return text, marked

    def _turn(self, row: Conversation, index: int, text: str) -> Span:
        """Where assistant message ``index`` stands in ``text``: after what the model is given to write it.

        Some templates (Qwen3's) write more into the last turn than into those before; then the turn is its content and
        what ends it.
        """
        prompt, _ = self._render(row, index, prompt=True)
        until, _ = self._render(row, index + 1)
        answer, content = until[len(prompt) :], row.messages[index]["content"]
        # Without a prompt of the template's own the answer must start at once: else its header would be trained.
        prompted = prompt != self._render(row, index)[0] or answer.lstrip().startswith(content.strip())
        if text.startswith(prompt) and until.startswith(prompt) and prompted:
            written = f"{re.escape(content)}|{re.escape(content.strip())}"
            for start in [0, *(match.start() for match in re.finditer(written, answer))]:
                if text.startswith(answer[start:], len(prompt)):
                    return len(prompt), len(prompt) + len(answer) - start
        raise UserError(
            f"{row.where}: the chat template does not tell reliably which text is the assistant's: message {index + 1} "
            "does not follow what add_generation_prompt gives, or is written in another way when others come after it; "
            f"{_REMEDY}"
        )

    def _render(
        self, row: Conversation, count: int, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """The first ``count`` messages, with the start of the assistant's turn if ``prompt``, and the marked spans."""
        try:
            texts, spans = render_jinja_template(
                [row.messages[:count]],
                chat_template=self._source,
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


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that follow each other without a gap as one: some templates (Phi-3's) mark a turn and its end apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined
