"""The chunked loss with an 8-bit output layer on a GPU: against the layer by itself, and against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from halo_train import RECIPES, HaloLinear
from halo_train.training.cross_entropy import LogitMap
from halo_train.training.loss import LinearCrossEntropy
from halo_train.training.output_layer import rounding_of

pytestmark = pytest.mark.gpu


def sqnr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    return 20 * torch.log10(exact.norm() / (found.double() - exact).norm()).item()


def operands(
    vocabulary: int, width: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, HaloLinear, torch.Tensor]:
    torch.manual_seed(0)
    head = HaloLinear(width, vocabulary, device="cuda", dtype=dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    # Hidden states that know something of the next token.
    h = (
        torch.randn(tokens, width, device="cuda")
        + 4 * F.normalize(head.weight[targets].float()) * width**0.5 / 8
    )
    h[:, 5] *= 30
    return h.bfloat16().detach().requires_grad_(), head, targets


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain", "halo2_int8"])
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(5003, torch.bfloat16), (5008, torch.float32), (32000, torch.bfloat16)],
)
def test_one_chunk_is_the_layer_by_itself(vocabulary: int, dtype: torch.dtype, recipe: str) -> None:
    h, head, targets = operands(vocabulary, 512, 300, dtype)
    config = dataclasses.replace(RECIPES[recipe], fast_accum=False)  # as it is converted
    head = HaloLinear.from_linear(head.to_linear(), config)
    logit_map = LogitMap(0.5, 20.0)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, (h, head.weight, head.bias))
        return [loss.detach(), *found]

    with torch.autocast("cuda", torch.bfloat16):
        y = head(h)
    expected = gradients(F.cross_entropy(logit_map(y.float()), targets, reduction="sum") / 256)
    rounding = rounding_of(head, h)
    loss = LinearCrossEntropy.apply(h, head.weight, head.bias, targets, logit_map, 4096, rounding)
    for found, exact in zip(gradients(loss / 256), expected, strict=True):
        assert found.dtype == exact.dtype or found.dim() == 0
        # A power of two multiplies before or after the rounding to 8 bits, which gives the same codes.
        assert sqnr_db(exact.double(), found) > 40, found.shape


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize("chunk", [128, 1024, 1000])
def test_chunks_against_float64(recipe: str, chunk: int) -> None:
    h, head, targets = operands(50257, 768, 2048, torch.bfloat16)
    config = dataclasses.replace(RECIPES[recipe], fast_accum=False)  # as it is converted
    head = HaloLinear.from_linear(head.to_linear(), config)
    exact_h, exact_w = h.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    exact_b = head.bias.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_h @ exact_w.t() + exact_b, targets, reduction="sum")
    expected = torch.autograd.grad(exact, (exact_h, exact_w, exact_b))

    rounding = rounding_of(head, h)
    loss = LinearCrossEntropy.apply(h, head.weight, head.bias, targets, LogitMap(), chunk, rounding)
    found = torch.autograd.grad(loss, (h, head.weight, head.bias))
    # Rounded to nearest, e4m3 makes products of like operands smaller by 1.4e-3: the logits of the targets here.
    assert loss.item() == pytest.approx(exact.item(), rel=4e-3 if recipe == "fp8" else 1e-3)
    for ours, theirs in zip(found, expected, strict=True):
        assert sqnr_db(theirs, ours) > 24
