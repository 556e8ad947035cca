"""What is done to a model block by block, a block being a decoder layer: activation checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from halo_train.linear import halo_linears

from .errors import UserError

KEPT_OPS = frozenset(
    {
        "halo_train::quantize_rows",
        "halo_train::quantize_tensor",
        "halo_train::norm_quantize",
        "halo_train::matmul_weight_rows",
        "halo_train::scaled_matmul",
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_flash_attention_forward",
        "torch_attn::_varlen_attn",
    }
)
"""Ops whose outputs selective checkpointing keeps: the rounded inputs of the products, the products, attention. But not what
``gated_quantize`` writes, which is as wide as the MLP and one pass over gate and up, which are kept."""


def checkpoint_activations(model: nn.Module, mode: Literal["selective", "full"]) -> None:
    """Recomputes a block's activations in backward; the results are bitwise those without it.

    ``full`` keeps the input of each block only. ``selective`` keeps the outputs of :data:`KEPT_OPS` and recomputes what is
    cheap, norms, rotary embeddings and activation functions: no product is computed twice.

    Raises:
        UserError: a model without blocks.
    """
    for block in blocks(model, f"train.activation_checkpointing={mode}"):
        for _, layer in halo_linears(block):
            layer.input_is_kept = False  # but recomputed, or kept rounded
        # The forward and not the call, so that hooks, those of FSDP2 among them, run once.
        block.forward = _checkpointed(block.forward, mode)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile on each block; the code of one serves all blocks of its kind.

    After :func:`checkpoint_activations`; compiled code that recomputes cannot take equalisers (:func:`halo_train.collect_equalizers`).

    Raises:
        UserError: a model without blocks.
    """
    for block in blocks(model, "train.compile=true"):
        block.compile()


def blocks(model: nn.Module, wanted_by: str) -> Iterator[nn.Module]:
    """The repeated layers of a model of transformers.

    Raises:
        UserError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"{wanted_by} needs a model made of transformers' GradientCheckpointingLayer; {type(model).__name__} has none"
        )
    inside = {id(inner) for block in found for inner in block.modules() if inner is not block}
    return (block for block in found if id(block) not in inside)


def _checkpointed(forward: Callable[..., Any], mode: Literal["selective", "full"]) -> Callable[..., Any]:
    policy = _keep if mode == "selective" else _recompute
    contexts = partial(create_selective_checkpoint_contexts, policy)

    # A function of its own: torch.compile sees through it, but not through a partial of torch's checkpoint, nor on torch 2.11
    # through the context function that checkpoint has by default.
    def run(*args: Any, **kwargs: Any) -> Any:
        # Compiled without a policy, torch 2.11 recomputes nothing inside of autograd Functions. Eager, a policy costs time.
        if mode == "full" and not torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


def _keep(ctx: Any, op: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # A rounded weight is a byte an element of the whole model, and quickly made again.
    first = args[0] if args else None
    of_weight = isinstance(first, Tensor) and isinstance(
        first if first._base is None else first._base, nn.Parameter
    )
    if op.name() in KEPT_OPS and not of_weight:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(ctx: Any, op: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE
