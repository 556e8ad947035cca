"""Rows -> token ids, and which of them carry loss: completions, texts, or the assistant's turns of a conversation."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chat_template import REMEDY, ChatTemplate
from .errors import UserError
from .formats import Conversation, Row
from .store import Example


class Encoder:
    """Token ids with the loss on completions (and their end-of-text token) or assistant turns (and their end) only.

    Args:
        tokenizer: of transformers, with an eos token.
        seq_len: tokens; longer rows are cut at their end, longer texts into pieces.

    Raises:
        UserError: no eos token.
    """

    def __init__(self, tokenizer: Any, seq_len: int) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer in model.path has no eos_token, so a model cannot learn where a completion ends; add one "
                "to its tokenizer_config.json"
            )
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._start = (
            [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        )
        self._template: ChatTemplate | None = None

    def __call__(self, rows: Sequence[Row | Conversation]) -> list[Example]:
        """Documents with at least one trained token, each with the number of its row in ``rows``, all of one class.

        Raises:
            UserError: no chat template, or one that does not tell reliably which tokens are the assistant's.
        """
        pairs = [row for row in rows if isinstance(row, Row)]
        conversations = [row for row in rows if isinstance(row, Conversation)]
        whole = self._pairs(pairs) if pairs else self._conversations(conversations)
        return [
            piece
            for number, (row, example) in enumerate(zip(rows, whole, strict=True))
            for piece in self._fit(example, number, is_text=isinstance(row, Row) and row.prompt is None)
            if piece.trained
        ]

    def _fit(self, example: Example, row: int, is_text: bool) -> list[Example]:
        """At most seq_len tokens each: the start of the row, or all pieces of a text."""
        length, limit = len(example.ids), self._seq_len
        pieces = []
        for start in range(0, length if is_text else 1, limit):
            # The first token of a piece has nothing before it to be predicted from.
            spans = [
                (max(a - start, 1), min(b - start, limit))
                for a, b in example.trained
                if a - start < limit and b - start > 1
            ]
            cut = length > limit and not is_text
            pieces.append(Example(example.ids[start : start + limit], spans, row, cut))
        return pieces

    def _pairs(self, rows: Sequence[Row]) -> list[Example]:
        """Prompt and completion are tokenised apart, so the mask ends exactly where the completion starts."""
        prompts = self._ids([row.prompt or "" for row in rows])
        completions = self._ids([row.completion for row in rows])
        examples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = self._start + prompt + completion + [self._tokenizer.eos_token_id]
            examples.append(Example(ids, [(max(1, len(self._start) + len(prompt)), len(ids))]))
        return examples

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _conversations(self, rows: Sequence[Conversation]) -> list[Example]:
        """Conversations as the chat template writes them; the loss is on each assistant turn and the token that ends it.

        The text is tokenised whole, as the model will see it; a token belongs to a turn when they share a character.
        """
        template = self._template = self._template or self._chat_template()
        rendered = [template.turns(row) for row in rows]
        encoded = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,  # about rows longer than the model takes, which are cut
        )
        examples = []
        for row, (_, turns), ids, offsets in zip(
            rows, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
            spans = [(max(1, bisect_right(ends, start)), bisect_left(starts, end)) for start, end in turns]
            for start, end in spans:
                if template.special_ids.isdisjoint(ids[start:end]):
                    raise UserError(
                        f"{row.where}: the chat template ends the assistant's turn without a special token, or leaves it "
                        f"out of {{% generation %}}, so a model cannot learn where to stop; {REMEDY}"
                    )
            examples.append(Example(ids, spans))
        return examples

    def _chat_template(self) -> ChatTemplate:
        if self._tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer in model.path has no chat template, which messages need; take the directory of a chat "
                "model, put a chat_template.jinja beside the tokenizer, or use rows with prompt and completion"
            )
        if not self._tokenizer.is_fast:
            raise UserError(
                "the tokenizer in model.path does not tell which text a token stands for, so messages cannot be masked; "
                "give it a tokenizer.json, or use rows with prompt and completion"
            )
        return ChatTemplate(self._tokenizer)


def decode_pieces(document: NDArray[np.int32], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a document in order, special tokens included, and of each piece whether it is trained.

    Args:
        document: tokens, those without loss as ``~id``.
    """
    pieces = []
    for trained, tokens in groupby(document.tolist(), key=lambda token: token >= 0):
        ids = [token if trained else ~token for token in tokens]
        pieces.append((tokenizer.decode(ids, clean_up_tokenization_spaces=False), trained))
    return pieces
