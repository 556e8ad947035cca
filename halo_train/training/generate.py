"""Greedy generation in batches, the same text as one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from .distributed import Ranks


@torch.no_grad()
def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    batch: int,
    progress: Callable[[int], object] = lambda finished: None,
    ranks: Ranks | None = None,
) -> list[list[int]]:
    """The most likely next token, again and again, after each prompt, by transformers' ``generate`` and its KV cache.

    Prompts of similar length share a batch, padded on the left under an attention mask.

    Args:
        model: a causal language model of transformers; its own generation settings (sampling, penalties) are not used.
        prompts: token ids, each at least one.
        stop_ids: ends a text; not part of what is returned.
        batch: prompts in one forward pass.
        progress: told after each batch how many prompts it finished.
        ranks: processes that share the prompts; None is this one alone. All call this and run as many forward passes, because
            sharded layers need every process in each.

    Returns:
        New token ids in the order of the prompts; ``max_new_tokens`` of them where no stop token came.
    """
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad_id
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what needs most memory comes first
    ranks = ranks or Ranks(0, 1, model.device)
    results: dict[int, list[int]] = {}
    stop = set(stop_ids)
    with _generating(model, settings):
        batches = (order[start : start + batch] for start in range(0, len(order), batch))
        for rows, counts in ranks.share(batches):
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad_id)
            mask = torch.zeros((len(rows), longest), dtype=torch.int64)
            for row, i in enumerate(rows):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            out = model.generate(
                ids.to(model.device), attention_mask=mask.to(model.device), synced_gpus=ranks.several
            )
            if not counts:
                continue
            for row, i in enumerate(rows):
                new = out[row, longest:].tolist()
                end = next((at for at, token in enumerate(new) if token in stop), len(new))
                results[i] = new[:end]
            progress(len(rows))
    results = ranks.union(results)
    return [results[i] for i in range(len(prompts))]


@contextmanager
def _generating(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """In evaluation mode with these settings alone: ``generate`` would fill gaps from the model's own, e.g. a penalty."""
    training, own = model.training, model.generation_config
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = own
