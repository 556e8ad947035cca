"""Exact match: a model writes an answer to each prompt of a file, and its end result is compared with the file's.

GSM8K's measure (arXiv 2110.14168) is ``pattern="####"``: the number after the mark, without commas and dollar signs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import torch

from .distributed import Ranks
from .errors import UserError
from .formats import Conversation, Row
from .generate import greedy


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, and what has to come out."""

    prompt: str
    ids: list[int]
    reference: str
    expected: str


@dataclass(frozen=True)
class Sample:
    """What became of a question."""

    prompt: str
    reference: str
    generated: str
    expected: str
    answer: str | None
    """None where the generated text has no answer, or the prompt was too long for the model."""
    correct: bool


@dataclass(frozen=True)
class Score:
    """Outcome over all questions."""

    samples: list[Sample]

    @property
    def exact_match(self) -> float:
        return sum(sample.correct for sample in self.samples) / len(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with every sample."""
        p, n = self.exact_match, len(self.samples)
        return {
            "exact_match": p,
            "standard_error": math.sqrt(p * (1 - p) / n),
            "correct": sum(sample.correct for sample in self.samples),
            "questions": n,
            "without_answer": sum(sample.answer is None for sample in self.samples),
            "samples": [asdict(sample) for sample in self.samples],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        values = self.to_dict()
        return (
            f"exact match {100 * values['exact_match']:.2f}% (standard error {100 * values['standard_error']:.2f}), "
            f"{values['correct']} of {values['questions']}; without an answer: {values['without_answer']}"
        )


def answer_in(text: str, pattern: str | None) -> str | None:
    """The answer of a text in the form in which two are compared; None where there is none.

    Args:
        pattern: a regular expression; the answer is its first group or, without a group, the rest of the line after its
            first match. None takes the whole text.
    """
    if pattern is not None:
        match = re.search(pattern, text)
        if match is None:
            return None
        text = match[1] if match.re.groups else text[match.end() :].partition("\n")[0]
    return _normalised(text or "") or None


def _normalised(text: str) -> str:
    """Numbers without ``,``, ``$`` and a full stop, 18.00 as 18; other text without the white space around it."""
    text = text.strip()
    number = re.sub(r"(?<=\d),(?=\d)|\$|\.$", "", text).strip()
    try:
        return f"{Decimal(number).normalize():f}"
    except InvalidOperation:
        return text


def questions(
    rows: Sequence[Row | Conversation], tokenizer: Any, pattern: str | None, name: str
) -> list[Question]:
    """Prompts as the model saw them in training, and the answers of the completions or the last assistant turns.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: no rows; rows without a prompt; a pattern that is no regular expression, or that a row has no answer to.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    found = []
    for number, row in enumerate(rows, start=1):
        prompt, ids, reference = _prompt(row, tokenizer, f"{name}, row {number}")
        expected = answer_in(reference, pattern)
        if expected is None:
            raise UserError(
                f"{name}, row {number}: its answer, {reference[-60:]!r}, has nothing after the pattern {pattern!r}; choose "
                "another pattern"
            )
        found.append(Question(prompt, ids, reference, expected))
    return found


def _prompt(row: Row | Conversation, tokenizer: Any, where: str) -> tuple[str, list[int], str]:
    if isinstance(row, Conversation):
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        text = tokenizer.apply_chat_template(row.messages[:last], add_generation_prompt=True, tokenize=False)
        return text, tokenizer(text, add_special_tokens=False)["input_ids"], row.messages[last]["content"]
    if row.prompt is None:
        raise UserError(
            f"{where}: a row of format text has no prompt to answer; use prompt and completion, or messages"
        )
    start = tokenizer("")["input_ids"]
    begin = start[:1] if start[:1] == [tokenizer.bos_token_id] else []
    ids = begin + tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"{where}: the prompt is empty; remove the row")
    return row.prompt, ids, row.completion


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: eos of tokenizer and model, and what the chat template writes after the assistant's turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False)
        after = tokenizer(text[text.rindex("2") + 1 :], add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(i for i, entry in added if entry.special)}
        found.add(next((token for token in after if token in special), None))
    return sorted(found - {None})


def exact_match(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    pattern: str | None,
    *,
    max_new_tokens: int,
    batch: int,
    progress: Callable[[int], object] = lambda finished: None,
    ranks: Ranks | None = None,
) -> Score:
    """Lets the model answer every question, greedily, under bfloat16 autocast.

    A prompt that leaves less than ``max_new_tokens`` of the model's positions is not asked and counts as wrong.

    Args:
        asked: from :func:`questions`, at least one.
        batch, progress, ranks: see :func:`halo_train.training.generate.greedy`.
    """
    window = getattr(model.config, "max_position_embeddings", None) or math.inf
    short = [question for question in asked if len(question.ids) + max_new_tokens <= window]
    ends = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    with torch.autocast(model.device.type, torch.bfloat16):
        written = greedy(
            model,
            [question.ids for question in short],
            max_new_tokens=max_new_tokens,
            stop_ids=ends,
            pad_id=pad,
            batch=batch,
            progress=progress,
            ranks=ranks,
        )
    texts = {
        id(question): tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for question, ids in zip(short, written, strict=True)
    }
    samples = []
    for question in asked:
        text = texts.get(id(question), "")
        answer = answer_in(text, pattern)
        samples.append(
            Sample(
                prompt=question.prompt,
                reference=question.reference,
                generated=text,
                expected=question.expected,
                answer=answer,
                correct=answer == question.expected,
            )
        )
    return Score(samples)
