"""Faults planted in one product of one layer are found there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from training_fixtures import write_run

from halo_train import convert_to_halo_training, ops
from halo_train.recipes import finetune
from halo_train.training.blocks import checkpoint_activations, compile_blocks
from halo_train.training.config import load_config
from halo_train.training.data import Batch
from halo_train.training.errors import RunFailed
from halo_train.training.loss import TokenLoss
from halo_train.training.watchdog import locate_non_finite

LLAMA = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
IDS = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loss() -> TokenLoss:
    transformers.set_seed(0)
    loss = TokenLoss(transformers.LlamaForCausalLM(copy.deepcopy(LLAMA))).train()
    convert_to_halo_training(loss.model)
    with torch.no_grad():  # the layers take their equaliser
        loss.model(IDS)
    return loss


def locate(loss: TokenLoss) -> str:
    return locate_non_finite(loss, [Batch(IDS, IDS, None, 32, 30)], torch.device("cpu"))


def spoil_product(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The ``number``-th 8-bit product from now has one NaN; 14 layers, forward and then backward with two products each."""
    calls = 0

    def spoil(product: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            product[1, 2] = torch.nan

    after_products(monkeypatch, spoil)


def after_products(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], None]) -> None:
    """Every 8-bit product is handed to ``spoil`` before anything reads it."""

    def spoiled(multiply: Callable[..., Tensor], products: int) -> Callable[..., Tensor]:
        def wrapped(*args: object) -> Tensor | tuple[Tensor, ...]:
            found = multiply(*args)
            for product in found[:products] if isinstance(found, tuple) else (found,):
                spoil(product)
            return found

        return wrapped

    for name in (
        "scaled_matmul",
        "matmul_rows",
        "matmul_weight_rows",
        "matmul_weight_columns",
        "matmul_rounded",
        "matmul_gradients",
        "matmul_rotated",
    ):
        monkeypatch.setattr(ops, name, spoiled(getattr(ops, name), 2 if name == "matmul_gradients" else 1))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "fprop of model.layers.0.self_attn.q_proj"),
        (14, "fprop of model.layers.1.mlp.down_proj"),
        (15, "dgrad of model.layers.1.mlp.down_proj"),
        (16, "wgrad of model.layers.1.mlp.down_proj"),
        (41, "dgrad of model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_product(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch, number: int, expected: str) -> None:
    spoil_product(monkeypatch, number)
    assert locate(loss) == expected
    assert all(p.grad is None for p in loss.parameters())
    assert locate(loss).startswith("nothing when the step was repeated")


@pytest.mark.parametrize("number", [1, 14])
@pytest.mark.parametrize("how", ["full", "selective", "compiled"])
def test_a_product_under_recomputation_and_compilation(
    loss: TokenLoss, monkeypatch: pytest.MonkeyPatch, number: int, how: str
) -> None:
    loss(IDS, IDS).backward()
    if how == "compiled":
        monkeypatch.setattr(torch, "compile", lambda call, **_: torch._dynamo.optimize("eager")(call))
        compile_blocks(loss.model)
    else:
        checkpoint_activations(loss.model, how)  # type: ignore[arg-type]
    spoil_product(monkeypatch, number)
    found = locate(loss)
    layer = {1: "0.self_attn.q_proj", 14: "1.mlp.down_proj"}[number]
    assert found == f"fprop of model.layers.{layer}"


def test_an_overflow(loss: TokenLoss) -> None:
    """bfloat16 reaches 3.4e38; the squares of its largest values are infinite in the norm."""
    torch.nn.init.constant_(loss.model.model.layers[1].mlp.down_proj.weight, 3e38)
    found = locate(loss)
    assert found in ("fprop of model.layers.1.mlp.down_proj", "output of model.norm")


def test_between_layers(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(module: object, query: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return query.transpose(1, 2) * torch.inf, None

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "planted", attention)
    loss.model.config._attn_implementation = "planted"
    expected = "what comes before model.layers.0.self_attn.o_proj, its input"
    assert locate(loss) == expected


def test_the_loss_and_a_weight(loss: TokenLoss) -> None:
    torch.nn.init.constant_(loss.model.lm_head.weight, 3e38)
    assert locate(loss) == "output layer and loss"
    loss.model.lm_head.weight.data[3, 4] = torch.nan
    assert locate(loss) == "the weight lm_head.weight, before the step"


def test_a_run_names_the_product_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite weight gradient in every step from the third on."""
    run = tmp_path / "runs" / "tiny"

    def spoil(product: Tensor) -> None:
        if (
            run / "checkpoints" / "step-2"
        ).exists() and product.dtype == torch.float32:  # dW of float32 weights; the others are bfloat16
            product[0, 0] = torch.inf

    after_products(monkeypatch, spoil)
    message = (
        r"step 3: .*gradient norm (nan|inf) is not finite; first: wgrad of model\.layers\.1\.mlp\.down_proj; the weights "
        r"were not updated.*step-2, is kept"
    )
    with pytest.raises(RunFailed, match=message):
        finetune.run(load_config(write_run(tmp_path)))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
