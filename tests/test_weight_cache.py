"""The kept weight of gradient accumulation: the bits of rounding it again, and never after the weight has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halo_train import HaloLinear, operands, ops


@pytest.fixture
def rounded(monkeypatch) -> list[Tensor]:
    """The weights that were rounded, one entry a time."""
    seen: list[Tensor] = []

    def counting(weight, equalizer, config):
        seen.append(weight)
        return original(weight, equalizer, config)

    def counting_product(a, scale_a, weight, *others):
        seen.append(weight)
        return original_product(a, scale_a, weight, *others)

    def counting_both(x, x_col_scale, weight, *others):
        seen.append(weight)
        return original_both(x, x_col_scale, weight, *others)

    original, original_product = operands.quantize_weight, ops.matmul_weight_rows
    original_both = ops.matmul_rounded
    monkeypatch.setattr(operands, "quantize_weight", counting)
    monkeypatch.setattr(ops, "matmul_weight_rows", counting_product)
    monkeypatch.setattr(ops, "matmul_rounded", counting_both)
    return seen


def layer() -> HaloLinear:
    torch.manual_seed(0)
    return HaloLinear(32, 48)


def step(halo: nn.Module, micro_batches: int = 3) -> list[Tensor]:
    x = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(micro_batches)]
    outputs = []
    for each in x:
        y = halo(each)
        y.square().mean().backward()
        outputs.append(y.detach())
    return outputs


def fresh(halo: HaloLinear, run: Callable[[HaloLinear], list[Tensor]]) -> list[Tensor]:
    """What a copy of the layer gives that never keeps a weight."""
    twin = copy.deepcopy(halo)
    twin._weight_cache.get = lambda *_: None
    outputs = run(twin)
    return [*outputs, twin.weight.grad, twin.bias.grad]


def test_rounded_once_a_step_with_the_same_bits(rounded):
    halo = layer()
    optimizer = torch.optim.SGD(halo.parameters(), 0.1)
    counts = []
    for _ in range(3):
        optimizer.zero_grad()
        if not halo.equalizer_taken:
            halo(torch.randn(8, 32))
        expected = fresh(halo, step)
        rounded.clear()
        outputs = step(halo)
        counts.append(len(rounded))
        assert all(
            torch.equal(a, b)
            for a, b in zip([*outputs, halo.weight.grad, halo.bias.grad], expected, strict=True)
        )
        optimizer.step()
    # Nothing is kept before a second micro-batch has shown that there are several.
    assert counts == [2, 1, 1]


def test_nothing_is_kept_without_accumulation(rounded):
    halo = layer()
    optimizer = torch.optim.SGD(halo.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        step(halo, 1)
        optimizer.step()
        assert halo._weight_cache._value is None
    assert len(rounded) == 4


def _load(halo: HaloLinear) -> None:
    halo.load_state_dict({name: 2 * value for name, value in halo.state_dict().items()})


def _fused(halo: HaloLinear) -> None:
    torch.optim.AdamW(halo.parameters(), 0.1, fused=True).step()


def _foreach(halo: HaloLinear) -> None:
    torch.optim.AdamW(halo.parameters(), 0.1, foreach=True).step()


def _by_pointer(halo: HaloLinear) -> None:
    class Raw(torch.optim.Optimizer):
        """As kernels of other libraries do: the version of the weight stays."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.mul_(2)

    Raw(halo.parameters(), {}).step()


def _in_place(halo: HaloLinear) -> None:
    with torch.no_grad():
        halo.weight.mul_(2)


def _new_memory(halo: HaloLinear) -> None:
    halo.weight.data = halo.weight.data * 2


def _new_parameter(halo: HaloLinear) -> None:
    grad = halo.weight.grad
    halo.weight = nn.Parameter(halo.weight.detach() * 2)
    halo.weight.grad = grad


def _equalizer(halo: HaloLinear) -> None:
    halo.equalizer_exponent.add_(torch.arange(32) % 3)


def _recipe(halo: HaloLinear) -> None:
    halo.config = HaloLinear(32, 48, recipe="int8").config


def _data_around_evaluation(halo: HaloLinear) -> None:
    with torch.no_grad():
        halo(torch.randn(8, 32))
    halo.weight.data.mul_(2)


CHANGES = [
    _load,
    _fused,
    _foreach,
    _by_pointer,
    _in_place,
    _new_memory,
    _new_parameter,
    _equalizer,
    _recipe,
    _data_around_evaluation,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weight_is_seen(change):
    halo = layer()
    step(halo)
    assert halo._weight_cache._value is not None
    change(halo)
    x = torch.randn(8, 32)
    assert torch.equal(halo(x), copy.deepcopy(halo)(x))


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_after_the_first_micro_batch_is_seen(change):
    halo = layer()
    step(halo, 1)
    change(halo)
    for _ in range(3):
        x = torch.randn(8, 32)
        assert torch.equal(halo(x), copy.deepcopy(halo)(x))


def test_a_step_without_gradients_set_to_none_is_seen():
    halo = layer()
    optimizer = torch.optim.AdamW(halo.parameters(), 0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        outputs = step(halo, 2)
        assert torch.equal(outputs[0], fresh(halo, lambda twin: step(twin, 2))[0])
        optimizer.step()


def test_a_write_through_data_without_a_gradient_is_seen():
    halo = layer()
    x = torch.randn(8, 32)
    for _ in range(4):
        halo(x)
        halo.weight.data.mul_(2)
    assert torch.equal(halo(x), copy.deepcopy(halo)(x))


def test_frozen_weights_are_kept_and_evaluation_forgets_them(rounded):
    halo = layer().requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    for _ in range(4):
        y = halo(x)
    assert len(rounded) == 2
    halo.eval()
    assert torch.equal(halo(x), y)
    assert halo._weight_cache._value is None


def test_copies_pickles_and_devices_start_empty():
    halo = layer()
    step(halo)
    buffer = io.BytesIO()
    torch.save(halo, buffer)
    buffer.seek(0)
    assert buffer.getbuffer().nbytes < 12_000
    for twin in (copy.deepcopy(halo), torch.load(buffer, weights_only=False)):
        assert twin._weight_cache._value is None
    assert "_weight_cache" not in vars(halo.to_linear())
    halo.double()
    assert halo._weight_cache._value is None


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_recomputes_the_same_bits(selective):
    """A selective policy replays saved operators by their order: a rounding that only one pass runs would shift it."""
    op = torch.ops.halo_train.quantize_rows.default

    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func == op else CheckpointPolicy.PREFER_RECOMPUTE

    context = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    square = HaloLinear(32, 32)
    results = []
    for wrapped in (False, True):
        square.zero_grad()
        for i in range(3):
            x = torch.randn(32, 32, generator=torch.Generator().manual_seed(i))
            y = checkpoint(square, x, use_reentrant=False, **context) if wrapped else square(x)
            y.square().sum().backward()
        results.append(square.weight.grad)
    assert torch.equal(*results)


def test_double_use_of_a_layer_under_accumulation():
    halo = HaloLinear(32, 32)
    x = torch.randn(8, 32)
    halo(x)

    def twice(module: HaloLinear) -> list[Tensor]:
        for _ in range(3):
            module(module(x)).square().sum().backward()
        return []

    expected = fresh(halo, twice)
    twice(halo)
    assert torch.equal(halo.weight.grad, expected[0])


def test_compiled_layers_round_inside_the_graph():
    torch.compiler.reset()
    halo = layer()
    step(halo)
    compiled = torch.compile(halo, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 32)
    for _ in range(2):
        assert torch.equal(compiled(x), copy.deepcopy(halo)(x))
        _in_place(halo)
        halo.weight.grad = torch.ones_like(halo.weight)
