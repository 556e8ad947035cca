"""Next-token cross-entropy that never holds the logits of all tokens, so that a 128k vocabulary does not set the peak memory.

The gradients of a chunk of tokens are formed with its logits, in forward; nothing is computed twice. The idea is that of
Liger-Kernel's fused linear cross-entropy and of ``torch.nn.functional.linear_cross_entropy`` (torch 2.13); neither of
them serves CPU and GPU, soft-capped logits and every torch that this library runs with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_train import HaloLinear
from halo_train.products import without_autocast

from .cross_entropy import LogitMap, loss_and_slope, runs_kernel
from .data import IGNORE
from .output_layer import PlainProducts, Products, RoundedProducts, Rounding, finish_wgrad, rounding_of, show

MAX_LOGITS = 1 << 29
"""Logits that exist at a time where the kernel forms the loss: 1 GiB in bfloat16. The sum of the weight's gradients is read and
written once a chunk, which with chunks of a quarter of this took longer than all passes over the logits."""

MAX_LOGITS_PLAIN = 1 << 27
"""Where PyTorch's operators do: 0.5 GiB in float32, and four times that for the steps of log-softmax and gradient."""

_TILE = 128
"""Rows of a tile of the matrix products."""


def chunk_rows(most: int, vocabulary: int) -> int:
    """Tokens of a chunk of at most ``most`` logits, in whole tiles where there is room for one; at least one token."""
    rows = max(1, most // vocabulary)
    return rows - rows % _TILE if rows > _TILE else rows


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``logit_map(h W^T + b)`` summed over the rows of h: a scalar, float32 or wider.

    h [M, K]; weight [V, K]; bias [V] or None; targets [M], int64 in [0, V). Products are in the dtype of h, or with a
    Rounding in 8 bits; logits in the dtype of h, the loss and the sum of db [V] over chunks in float32 or wider. Saved for backward: the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        chunk: int,
        rounding: Rounding | None = None,
    ) -> Tensor:
        needs_dh, needs_dw, needs_db = ctx.needs_input_grad[:3]
        wide = torch.promote_types(h.dtype, torch.float32)
        products: Products = (
            PlainProducts(weight, bias, h.dtype, needs_dw)
            if rounding is None
            else RoundedProducts(weight, bias, h.dtype, rounding, needs_dh, needs_dw)
        )
        total = torch.zeros((), dtype=wide, device=h.device)
        dh = torch.empty_like(h) if needs_dh else None
        db = torch.zeros_like(bias, dtype=wide) if needs_db else None  # type: ignore[arg-type]
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            z = products.logits(h[rows])
            loss, dz = loss_and_slope(z, targets[rows], logit_map, needs_dh or needs_dw or needs_db)
            total += loss
            if dz is None:
                continue
            if db is not None:
                db += dz.sum(0, dtype=wide)
            if not (needs_dh or needs_dw):
                continue
            gradient = products.gradient(dz)
            del z, dz  # rounded, it is there once more
            if dh is not None:
                dh[rows] = products.dgrad(gradient)
            if needs_dw:
                products.add_wgrad(gradient)
            del gradient  # before the logits of the next chunk
        equalizer = None if rounding is None else rounding.equalizer
        d = None if equalizer is None or not needs_dw else equalizer.d
        ctx.save_for_backward(dh, products.wgrad_sum() if needs_dw else None, db, d)
        ctx.weight_form, ctx.bias_dtype = (weight.shape, weight.dtype), None if bias is None else bias.dtype
        ctx.config = None if rounding is None else rounding.config
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw, db, d = ctx.saved_tensors
        return (
            None if dh is None else dh * grad.to(dh.dtype),
            None if dw is None else finish_wgrad(dw, grad, d, ctx.weight_form, ctx.config),
            None if db is None else (db * grad).to(ctx.bias_dtype),
            *(None,) * 4,
        )


class TokenLoss(nn.Module):
    """Cross-entropy of the next token of a causal language model, summed; bfloat16 autocast, logits in float32.

    The model's output layer is applied to the trained tokens only, a chunk at a time. A model whose way from the last
    hidden states to the logits is not understood computes its logits itself, all at once: :attr:`whole_logits`. With FSDP2
    or DDP this module is the root, not the model, whose parts it calls one by one.

    Args:
        model: of transformers, before its layers are converted or sharded. It becomes the submodule ``model``.
        max_logits: of a chunk; None is :data:`MAX_LOGITS` or :data:`MAX_LOGITS_PLAIN`.
    """

    model: Any

    def __init__(self, model: nn.Module, max_logits: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.max_logits = max_logits
        self.logit_map: LogitMap | None = None
        self.whole_logits: str | None = None
        """Why the logits of all tokens are formed at once, or None."""
        try:
            self.logit_map = measure_logit_map(model)
        except ValueError as error:
            self.whole_logits = str(error)

    def forward(self, ids: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The sum over the labels that carry loss, a scalar.

        Args:
            ids: [B, S], on the device of the model.
            labels: [B, S], :data:`IGNORE` where there is no loss; on the CPU they cost no wait for the GPU.
            inputs: further inputs of the model, e.g. position_ids.
        """
        goals = labels[:, 1:].flatten()
        trained = (goals != IGNORE).nonzero().squeeze(1)
        goals = goals[trained].to(ids.device, non_blocking=True)
        trained = trained.to(ids.device, non_blocking=True)
        with torch.autocast(ids.device.type, torch.bfloat16):
            if self.logit_map is None:
                logits = self.model(input_ids=ids, use_cache=False, **inputs).logits
                chosen = logits[:, :-1].flatten(0, 1).index_select(0, trained)
                wide = torch.promote_types(chosen.dtype, torch.float32)
                return F.cross_entropy(chosen.to(wide), goals, reduction="sum")
            hidden = self.model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1).index_select(0, trained)
        head = self.model.get_output_embeddings()
        if hidden.dtype == torch.float32:
            hidden = hidden.to(torch.bfloat16)  # as the autocast of the output layer would
        with without_autocast(hidden.device.type):
            return self._of(hidden, head, goals)

    def _of(self, hidden: Tensor, head: Any, goals: Tensor) -> Tensor:
        assert self.logit_map is not None
        rounding = rounding_of(head, hidden)
        if rounding is not None:
            show(head, hidden, goals, self.logit_map)
        most = self.max_logits or (MAX_LOGITS if runs_kernel(hidden) else MAX_LOGITS_PLAIN)
        chunk = chunk_rows(most, head.weight.shape[0])
        return LinearCrossEntropy.apply(
            hidden, head.weight, head.bias, goals, self.logit_map, chunk, rounding
        )


@torch.no_grad()
def measure_logit_map(model: nn.Module) -> LogitMap:
    """What the model does between its output layer and its logits, found by handing it made-up outputs of both parts.

    No layer of the model computes anything, so this is quick on any device, meta included. Configs name the same thing
    differently, and the same name means a factor in one model and a divisor in another; hence this way.

    Raises:
        ValueError: why the logits are not a LogitMap of the output layer's products.
    """
    base, head = getattr(model, "base_model", model), model.get_output_embeddings()  # type: ignore[operator]
    if base is model or type(head) not in (nn.Linear, HaloLinear):
        raise ValueError("it has no separate base model and nn.Linear output layer")
    hidden = torch.linspace(-1, 1, 2 * head.in_features).view(1, 2, -1)
    products = torch.linspace(-1000, 1000, 2 * head.out_features).view(1, 2, -1)
    # The slope at 0 and the limit.
    small, large = 2.0**-14, 1e6
    products[0, 0, :2] = torch.tensor([small, large])
    seen: list[Tensor] = []

    def output_layer(x: Tensor) -> Tensor:
        seen.append(x)
        return products

    with _forward(base, lambda *_, **__: _BaseOutput(hidden)), _forward(head, output_layer):
        try:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        except Exception as error:  # of code that we do not know
            raise ValueError(f"it cannot be tried out: {type(error).__name__}: {error}") from error
    if len(seen) != 1 or seen[0].device != hidden.device or not torch.equal(seen[0], hidden):
        raise ValueError("its output layer does not get the last hidden states as they are")
    scale = logits[0, 0, 0].item() / small
    limit = logits[0, 0, 1].item()
    found = LogitMap(scale, None if limit > 0.5 * scale * large else limit)
    if logits.shape != products.shape or not torch.allclose(found(products), logits.float(), rtol=1e-5):
        raise ValueError("it changes its logits by more than a factor and a soft cap")
    return found


class _BaseOutput:
    """What a base model returns, of any model: the last hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _forward:
    """While active, ``module.forward`` is another function."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.module.forward = self.forward

    def __exit__(self, *_: object) -> None:
        del self.module.forward
