"""Which documents stand in which row of a batch, and whether a model keeps packed documents apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import UserError

MOST_ROUNDING = 0.02
"""Of the difference that a neighbour without isolation makes: what :func:`require_isolation` takes for rounding."""


@dataclass(frozen=True)
class Rows:
    """Row ``r`` of the data holds ``documents[ends[r - 1]:ends[r]]``."""

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.documents[self.ends[row - 1] if row else 0 : self.ends[row]]


def one_a_row(documents: NDArray[np.int64], lengths: NDArray[np.int64]) -> Rows:
    """Every document in a row of its own."""
    return Rows(documents, np.arange(1, len(documents) + 1), lengths)


def pack(documents: NDArray[np.int64], lengths: NDArray[np.int64], seq_len: int, seed: int) -> Rows:
    """Best-fit decreasing: the longest document first, each into the fullest row that still has room for it.

    Args:
        documents, lengths: numbers and tokens, at most ``seq_len``, of the documents.
        seed: of the order among documents of one length, and of the rows.

    Returns:
        Rows of at most ``seq_len`` tokens. They stay the same over all epochs, whose order is that of the rows.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(documents))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_of = np.empty(len(documents), np.int64)
    used: list[int] = []
    by_room: dict[int, list[int]] = {}  # rows by the tokens that still fit
    rooms: list[int] = []  # its keys in order
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(used), seq_len
            used.append(0)
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        row_of[number] = row
        used[row] += length
        if room - length not in by_room:
            by_room[room - length] = []
            insort(rooms, room - length)
        by_room[room - length].append(row)
    mixed = generator.permutation(len(used))  # or the rows of long documents came first
    row_of = mixed[row_of]
    by_row = np.argsort(row_of, kind="stable")
    return Rows(
        documents[by_row], np.cumsum(np.bincount(row_of)), np.array(used, np.int64)[np.argsort(mixed)]
    )


@torch.no_grad()
def require_isolation(model: nn.Module, name: str) -> None:
    """Tries on a few random tokens that packed documents do not see each other: their logits must be those of each alone.

    Models of transformers build the attention mask of a packed row from positions that start again, where attention is all
    that joins tokens and ``attn_implementation`` supports it. Must run before the linear layers round to 8 bits.

    Args:
        model: a causal language model that takes ``position_ids``.
        name: of the model, for messages.

    Raises:
        UserError: it does not keep documents apart.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    if device.type == "meta":  # see sharded_load.weights_while_used
        device = torch.device("cpu")
    entries = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lengths, generator = (9, 7), torch.Generator().manual_seed(0)
    first, second = (torch.randint(entries, (n,), generator=generator).to(device) for n in lengths)
    ids = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    positions = torch.stack(
        [torch.cat([torch.arange(n, device=device) for n in order]) for order in (lengths, lengths[::-1])]
    )

    def second_logits(**inputs: Tensor) -> Tensor:
        """Of both rows, after the first document and before it."""
        logits = model(use_cache=False, **inputs).logits.float()
        return torch.stack([logits[0, lengths[0] :], logits[-1, : lengths[1]]])

    was_training = model.training
    model.eval()
    try:
        alone = model(use_cache=False, input_ids=second[None]).logits.float()
        joined = second_logits(input_ids=ids)
        packed = second_logits(input_ids=ids, position_ids=positions)
    except TypeError as error:
        raise UserError(
            f"data.packing=true: {name} takes no position_ids ({error}); set data.packing=false"
        ) from None
    finally:
        model.train(was_training)
    # Kernels round in another order for another shape; what a document takes from its neighbour is far more.
    rounding, leak = (packed - alone).norm(), (joined - alone).norm()
    if not rounding < MOST_ROUNDING * leak:
        raise UserError(
            f"data.packing=true: {name} does not keep packed documents apart: the logits of a document behind another one "
            f"differ from those of the document alone by {rounding / alone.norm():.1e} of their norm; set "
            "data.packing=false, or take a model and an attn_implementation that build their mask from position_ids"
        )
