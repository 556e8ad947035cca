"""Evaluation of a Hugging Face directory, or of the model that a run has exported: loss, exact match, lm-eval."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from .data import FixedBatches, Split
from .encode import Encoder
from .errors import UserError
from .exact_match import Score, exact_match, questions
from .formats import AUTO, FORMATS, Conversation, Row, row_format
from .logging import write_atomically
from .loop import evaluate
from .loss import TokenLoss
from .model import tokenizer_of, without_progress_bars
from .prepare import pad_id
from .sources import open_source
from .store import Documents, make_chunk
from .tokenised import read_rows

Task = Literal["loss", "exact-match"]
"""What is measured on the rows of a file; the loss always is."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a model."""

    data: Path | None
    """JSONL file for ``loss`` and ``exact-match``."""
    task: Task
    lm_eval: Sequence[str]
    """Tasks of lm-eval."""
    form: str
    """Of the rows, see ``data.format``."""
    rename: dict[str, str]
    """Of the fields of rows, see ``data.rename``."""
    pattern: str | None
    """Of the answer, see :func:`halo_train.training.exact_match.answer_in`."""
    limit: int | None
    """Rows, from the first."""
    max_new_tokens: int
    seq_len: int
    """Tokens after which a row is cut for its loss."""
    batch: int
    """Rows in one forward pass."""


def run_evaluation(path: Path, asked: Evaluation, device: torch.device, output: Path | None) -> Path:
    """Evaluates, prints and writes everything, with each sample, to a JSON file.

    Args:
        path: Hugging Face directory or folder of a run.
        output: of the file; None is ``path/eval/<name of the data>.json``.

    Returns:
        The file.

    Raises:
        UserError: no model, no data, a row without an answer, a package that is missing.
    """
    folder = model_directory(path)
    if asked.data is None and not asked.lm_eval:
        raise UserError(
            "nothing to evaluate on; give --data with a JSONL file, or --lm-eval with tasks of lm-eval"
        )
    if asked.form not in (AUTO, *FORMATS):
        raise UserError(f"--format must be one of {', '.join((AUTO, *FORMATS))}; got {asked.form!r}")
    results: dict[str, Any] = {"model": str(folder), "settings": {**asdict(asked), "data": str(asked.data)}}
    if asked.data is not None:
        source = open_source(str(asked.data), None, "test", "--data")
        rows = list(islice(read_rows(source, row_format(source, asked.form, asked.rename)), asked.limit))
        model, tokenizer = load_for_evaluation(folder, device)
        results["loss"] = validation_loss(model, tokenizer, rows, asked)
        print(
            f"loss {results['loss']['loss']:.4f} on {results['loss']['trained_tokens']} tokens",
            flush=True,
        )
        if asked.task == "exact-match":
            score = answer_rows(model, tokenizer, rows, asked)
            results["exact_match"] = score.to_dict()
            print(score, flush=True)
        del model
    if asked.lm_eval:
        results["lm_eval"] = lm_eval_tasks(folder, asked, device)
        for task, values in results["lm_eval"].items():
            figures = {key: value for key, value in values.items() if isinstance(value, float)}
            print(task, "  ".join(f"{key} {value:.4f}" for key, value in figures.items()), flush=True)
    name = asked.data.stem if asked.data is not None else "lm_eval"
    file = path / "eval" / f"{name}.json" if output is None else output
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n")
    return file


def model_directory(path: Path) -> Path:
    """``path`` itself, or the export in the folder of a run.

    Raises:
        UserError: neither is there.
    """
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{path} holds no model: neither config.json nor export/config.json; give a Hugging Face directory or the folder "
        "of a finished run"
    )


def load_for_evaluation(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model, in the dtype in which it is stored, and tokenizer.

    Raises:
        UserError: not loadable, or without a tokenizer.
    """
    try:
        with without_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"transformers cannot load a model from {folder}: {error}") from None
    return model.to(device).eval(), tokenizer_of(folder)


def validation_loss(
    model: Any, tokenizer: Any, rows: Sequence[Row | Conversation], asked: Evaluation
) -> dict[str, Any]:
    """Mean loss per trained token, in nats, under bfloat16 autocast; the mask is that of training.

    Raises:
        UserError: no token to train on, see :class:`halo_train.training.data.Split`.
    """
    window = getattr(model.config, "max_position_embeddings", None) or asked.seq_len
    seq_len = min(asked.seq_len, window)
    documents = Documents(make_chunk(Encoder(tokenizer, seq_len)(rows), len(rows)))
    split = Split(documents, np.arange(len(rows)), str(asked.data), seq_len=seq_len)
    batches = FixedBatches(split, asked.batch, pad_id(tokenizer))
    loss = evaluate(TokenLoss(model), _shown("loss", batches), model.device)
    return {"loss": loss, "rows": split.kept, "trained_tokens": split.trained_tokens}


def answer_rows(model: Any, tokenizer: Any, rows: Sequence[Row | Conversation], asked: Evaluation) -> Score:
    """Exact match.

    Raises:
        UserError: a row without a prompt or an answer.
    """
    found = questions(rows, tokenizer, asked.pattern, str(asked.data))
    with tqdm(total=len(found), desc="exact match", disable=not sys.stderr.isatty()) as bar:
        return exact_match(
            model,
            tokenizer,
            found,
            asked.pattern,
            max_new_tokens=asked.max_new_tokens,
            batch=asked.batch,
            progress=bar.update,
        )


def lm_eval_tasks(folder: Path, asked: Evaluation, device: torch.device) -> dict[str, Any]:
    """Results of EleutherAI's lm-eval, by task; prompts, data and scores are that package's.

    Raises:
        UserError: the package is not installed, or does not know a task.
    """
    try:
        import lm_eval
    except ModuleNotFoundError:
        raise UserError("--lm-eval needs EleutherAI's package: pip install 'lm-eval[hf]>=0.4.9'") from None
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "bfloat16"},
            tasks=list(asked.lm_eval),
            device=str(device),
            batch_size=asked.batch,
            limit=asked.limit,
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"--lm-eval {','.join(asked.lm_eval)}: {error}") from error
    return results["results"]


def _shown(label: str, batches: Sequence[Any]) -> Iterable[Any]:
    """With a bar on a terminal only."""
    return tqdm(batches, desc=label, disable=not sys.stderr.isatty())
