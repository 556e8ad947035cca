"""Inputs that several layers read: rounded and saved once, and right when anything changes in between."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from shared_input_fixtures import (
    GROUPS,
    QUANTISED,
    Pair,
    batch,
    build,
    count_roundings,
    equal,
    plain_first,
    plain_twin,
    relative,
    settled,
    step,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from halo_train import (
    RECIPES,
    HaloLinear,
    convert_to_halo_training,
    equalizer_state_dict,
    load_equalizer_state_dict,
    revert,
)
from halo_train.functional import halo_linear, round_input
from halo_train.metrics.products import sqnr_db
from halo_train.quantize import Equalizer, equalizer_exponents


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return count_roundings(monkeypatch)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops["quantize"] += "quantize" in op.name() or "weight_rows" in op.name()
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize(("m", "k"), [(16, 32), (7, 40), (300, 48), (1, 3)])
def test_sum_before_the_rotation_is_exact_without_rounding(recipe: str, m: int, k: int) -> None:
    config = RECIPES[recipe].without_rounding()
    x = torch.randn(m, k)
    weights = [torch.randn(n, k) for n in (24, 5)]
    d = torch.exp2(torch.randint(-3, 4, (k,)).float()) if config.equalize else None
    equalizer = None if d is None else Equalizer.of(d)
    results = []
    for shared in (True, False):
        xs, *ws = (t.clone().requires_grad_() for t in (x, *weights))
        rounded = round_input(xs, config, equalizer) if shared else None
        outputs = [halo_linear(xs, w, config=config, equalizer=equalizer, rounded_input=rounded) for w in ws]
        sum((y.square().sum() for y in outputs), torch.zeros(())).backward()
        results.append([*(y.detach() for y in outputs), *(w.grad for w in ws), xs.grad])
    x64, *w64 = (t.double().requires_grad_() for t in (x, *weights))
    sum(((x64 @ w.t()).square().sum() for w in w64), torch.zeros(())).backward()
    ours, alone = results
    assert equal(ours[:2], alone[:2])
    assert relative(ours[-1].double(), x64.grad) < 1e-5
    for mine, true in zip(ours[2:4], w64, strict=True):
        assert relative(mine.double(), true.grad) < 1e-5


@pytest.mark.parametrize("recipe", QUANTISED)
def test_summing_in_bfloat16_before_the_rotation_costs_little(recipe: str) -> None:
    config = RECIPES[recipe]
    x, *weights = (torch.randn(s) for s in ((256, 512), (512, 512), (128, 512), (128, 512)))
    x[:, [3, 70, 200]] *= 60
    x, *weights = (t.bfloat16() for t in (x, *weights))
    errors = [(torch.randn(256, len(w)) * torch.randn(256, 1).mul(2).exp()).bfloat16() for w in weights]
    equalizer = (
        Equalizer.of_exponents(equalizer_exponents(x, torch.cat(weights))) if config.equalize else None
    )
    exact = torch.cat(errors, 1).double() @ torch.cat(weights).double()

    def decibels(dtype: torch.dtype, shared: bool) -> float:
        xs = x.to(dtype).requires_grad_()
        rounded = round_input(xs, config, equalizer) if shared else None
        outputs = [
            halo_linear(xs, w.to(dtype), config=config, equalizer=equalizer, rounded_input=rounded)
            for w in weights
        ]
        (dx,) = torch.autograd.grad(outputs, xs, [e.to(dtype) for e in errors])
        return sqnr_db(exact, dx, dim=1).median().item()

    assert decibels(torch.float32, True) == pytest.approx(decibels(torch.float32, False), abs=1e-3)
    assert decibels(torch.bfloat16, True) > decibels(torch.bfloat16, False) - 0.15


def test_gradcheck_in_float64() -> None:
    config = RECIPES["halo2_int8"].without_rounding()
    x, w, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (5, 6), (4, 6)))

    def both(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        rounded = round_input(x, config)
        return tuple(halo_linear(x, each, config=config, rounded_input=rounded) for each in (w, v))

    assert torch.autograd.gradcheck(both, (x, w, v))


def test_rounded_input_of_another_x_is_refused() -> None:
    rounded = round_input(torch.randn(20, 32), RECIPES["int8"])
    with pytest.raises(ValueError, match=r"rounded_input must have data of shape \(48, 32\).*got \(32, 32\)"):
        halo_linear(torch.randn(40, 32), torch.randn(8, 32), config=RECIPES["int8"], rounded_input=rounded)


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_gives_the_bits_of_the_plain_path_forward_and_its_gradients(
    recipe: str, dtype: torch.dtype
) -> None:
    model = settled(recipe).to(dtype)
    x = batch(1).to(dtype)
    ours, plain = step(model, x), step(plain_twin(model), x)
    assert torch.equal(ours[0], plain[0])
    # dX differs in one rounding of a sum; behind it E of the earlier layers is rounded to 8 bits anew.
    for mine, other in zip(ours[1:], plain[1:], strict=True):
        assert relative(mine.float(), other.float()) < (0.05 if dtype is torch.bfloat16 else 0.01)


@pytest.mark.parametrize("recipe", QUANTISED)
def test_a_block_without_rounding(recipe: str) -> None:
    model = settled(RECIPES[recipe].without_rounding())
    exact = step(revert(plain_twin(model)), batch(1))
    for mine, true in zip(step(model, batch(1)), exact, strict=True):
        assert relative(mine, true) < 2e-5


@pytest.mark.parametrize("recipe", ["fp8", "halo1_int8"])
def test_rounded_once_and_saved_once(recipe: str, roundings: list[Any]) -> None:
    model = settled(recipe)
    twin = plain_twin(model)
    roundings.clear()
    counts, saved = [], []
    for each in (model, twin):
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if t.element_size() == 1:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with Count() as count, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = each(batch(1))
        counts.append(count.ops["quantize"])
        saved.append(sum(storages.values()))
        y.sum().backward()
    assert len(roundings) == 2  # q, k, v and gate, up; o and down read theirs alone
    assert counts == [4 + 7, 7 + 7]  # inputs and weights
    assert saved[1] - saved[0] == 3 * 16 * 48  # of q, k, v two and of gate and up one


def test_off_by_default_and_lone_layers_stay_plain(roundings: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_to_halo_training(model, recipe="int8", share_inputs=True)
    for _ in range(3):
        model(torch.randn(4, 32)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert model[1].input_group.settled
    assert roundings == []
    unshared = build(share=False)
    step(unshared, batch())
    assert all(m.input_group is None for m in unshared.modules() if isinstance(m, HaloLinear))


def test_one_equalizer_over_all_weights_of_a_group() -> None:
    model = build()
    block = model[0]
    with torch.no_grad():
        block.k.weight[:, 5] *= 64
    seen = []
    block.q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = step(model, batch())
    assert not torch.equal(block.q.equalizer(), block.k.equalizer())
    assert equal(first, step(plain_first(model), batch()))
    expected = equalizer_exponents(
        seen[0].reshape(-1, 40), torch.cat([block.q.weight, block.k.weight, block.v.weight])
    )
    step(model, batch(1))  # a second micro-batch
    assert not torch.equal(block.q.equalizer(), block.k.equalizer())
    torch.optim.SGD(model.parameters(), 0.5).step()  # what the factors are taken from was seen before it
    step(model, batch(1))
    for name in ("q", "k", "v"):
        assert torch.equal(block.get_submodule(name).equalizer_exponent, expected)
    assert torch.equal(block.gate.equalizer(), block.up.equalizer())


@pytest.mark.parametrize("equalising", [True, False])
@pytest.mark.parametrize(
    ("between", "times"),
    [
        (lambda h: None, 1),
        (lambda h: h.mul_(2), 2),
        (lambda h: (h[:2].zero_(), None)[1], 2),
        (lambda h: h.clone(), 2),
        (lambda h: h.detach(), 2),
    ],
)
def test_what_changed_in_between_is_rounded_again(
    roundings: list[Any], between: Any, times: int, equalising: bool
) -> None:
    model = Pair(lambda h: None)
    convert_to_halo_training(model, recipe="fp8" if equalising else "fp8_plain", share_inputs=True)
    x = torch.randn(8, 32)
    with torch.no_grad():
        model(x)
    assert model.a.input_group is model.b.input_group
    model.between = between
    equalizer_state_dict(model)
    twin = plain_twin(model)
    roundings.clear()
    ours = step(model, x)
    assert len(roundings) == times
    for mine, other in zip(ours, step(twin, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equalising", [True, False])
def test_others_may_read_other_tensors_in_between(roundings: list[Any], equalising: bool) -> None:
    model = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
    convert_to_halo_training(model, recipe="fp8" if equalising else "halo1_fp8", share_inputs=True)

    def run(x: Tensor, other: Tensor) -> None:
        a, b, c, d, e = model
        (b(a(x)) + c(other) + d(x) + e(other)).sum().backward()

    for _ in range(2):
        roundings.clear()
        run(torch.randn(4, 32), torch.randn(4, 32))
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert len(roundings) == 2
    a, b, c, d, e = (layer.input_group for layer in model)
    assert a is d
    assert c is e
    assert len({a, b, c}) == 3


@pytest.mark.parametrize("switch", ["no_grad", "autocast", "requires_grad"])
def test_another_mode_is_another_rounding(roundings: list[Any], switch: str) -> None:
    model = Pair(lambda h: None)
    convert_to_halo_training(model, recipe="int8", share_inputs=True)
    model(torch.randn(4, 32))
    equalizer_state_dict(model)
    roundings.clear()
    x = torch.randn(4, 32)
    if switch == "requires_grad":
        model.a(x)
        x.requires_grad_()
    else:
        x.requires_grad_()
        with torch.no_grad() if switch == "no_grad" else torch.autocast("cpu", dtype=torch.bfloat16):
            model.a(x)
    y = model.b(x)
    assert len(roundings) == 2
    assert y.dtype is torch.float32
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_gradient_accumulation_never_uses_a_weight_rounded_with_older_factors() -> None:
    model = build()
    x = [batch(seed) for seed in range(4)]
    for i, each in enumerate(x):  # the first micro-batch takes factors, the second keeps weights
        if i == 2:
            assert model[0].k._weight_cache._value is not None
            equalizer_state_dict(model)  # other factors in the midst of a step
        twin = plain_twin(model)
        y = model(each)
        assert torch.equal(y, twin(each))
        y.square().mean().backward()


@pytest.mark.parametrize("frozen", ["q.weight", "kv", "all"])
def test_frozen_weights(frozen: str) -> None:
    """As under LoRA: whoever reads first, what the others need is there."""
    model = settled("int8")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not (frozen == "all" or frozen in name or (frozen == "kv" and name[2] in frozen))
        )
    x = batch(1)
    results = []
    for each in (model, plain_twin(model)):
        inputs = x.detach().requires_grad_()
        each(inputs).square().mean().backward()
        results.append([inputs.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    for mine, other in zip(*results, strict=True):
        assert relative(mine, other) < 0.01


def test_autocast() -> None:
    model = settled()
    x = batch(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = step(model, x), step(plain_twin(model), x)
    assert torch.equal(ours[0], plain[0])
    assert {t.dtype for t in ours[1:]} == {torch.float32}
    for mine, other in zip(ours[1:], plain[1:], strict=True):
        # The sum of dX is rounded to bfloat16: an E that differs in its last bit may get another e4m3 value, 6% away.
        assert relative(mine, other) < 0.06


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(context: Any) -> None:
    model = settled().eval()
    with context():
        ours, plain = model(batch(1)), plain_twin(model)(batch(1))
    assert torch.equal(ours, plain)
    step(model.train(), batch(2))
    with context():
        assert torch.equal(model(batch(1)), ours)


def test_reset_finds_groups_and_factors_anew() -> None:
    model = settled()
    for layer in model.modules():
        if isinstance(layer, HaloLinear):
            layer.reset_equalizer()
    x = batch(7) * torch.logspace(-2, 2, 40)
    step(model, x)
    fresh = build()
    step(fresh, x)
    state = equalizer_state_dict(model)
    assert all(torch.equal(state[name], e) for name, e in equalizer_state_dict(fresh).items())
    model[0].k.reset_equalizer()
    assert model[0].q.input_group is None
    ours = step(model, x)
    assert torch.equal(ours[0], step(plain_twin(model), x)[0])


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_copies_keep_groups_of_their_own(steps: int) -> None:
    model = build()
    for seed in range(steps):
        step(model, batch(seed))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    expected = [step(model, batch(seed)) for seed in (5, 6)]
    for twin in twins:
        assert all(equal(step(twin, batch(seed)), e) for seed, e in zip((5, 6), expected, strict=True))
        for group in GROUPS:
            layers = [twin[0].get_submodule(name) for name in group]
            assert set(layers[0].input_group.members) == set(layers)
            assert layers[0].input_group is not model[0].get_submodule(group[0]).input_group
    alone = copy.deepcopy(model[0].q)
    assert list(alone.input_group.members) == [alone]


@pytest.mark.parametrize("keep_x", [True, False])
def test_nothing_outlives_the_step(monkeypatch: pytest.MonkeyPatch, keep_x: bool) -> None:
    model = settled()
    alive: list[weakref.ref[Tensor]] = []

    def watching(*args: Any) -> Any:
        rounded = round_input(*args)
        alive.extend(weakref.ref(t) for t in (rounded.carrier, rounded.quantized.data))
        return rounded

    monkeypatch.setattr("halo_train.shared_input.round_input", watching)
    gc.disable()  # no cycle either
    try:
        kept = batch(1)
        y = model(kept if keep_x else batch(1))
        y.sum().backward()
        del y
        assert len(alive) == 4
        assert all(ref() is None for ref in alive)
        x = torch.randn(4, 40)
        for name in ("q", "k", "v"):
            model[0].get_submodule(name)(x)
        assert alive[-1]() is None
        model[0].q(x)  # and the others never come
        assert alive[-1]() is not None
        del x
        assert alive[-1]() is None
    finally:
        gc.enable()


def test_compile_fullgraph_gives_the_eager_bits() -> None:
    torch._dynamo.reset()
    model = Pair(lambda h: None)
    convert_to_halo_training(model, share_inputs=True)
    model(torch.randn(8, 32))
    equalizer_state_dict(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 32)
    assert equal(step(compiled, x), step(plain_twin(model), x))
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["found", "restored", "copied"])
def test_compiled_a_group_rounds_and_transposes_its_input_once(how: str) -> None:
    model = build()
    model(batch())
    state = equalizer_state_dict(model)  # settles
    if how == "restored":
        model = build()
        load_equalizer_state_dict(model, state)
    elif how == "copied":
        model = copy.deepcopy(model).to(torch.float64).float()
    rounded: list[tuple[int, ...]] = []
    transposed: list[tuple[int, ...]] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.halo_train.quantize_rows.default:
                shape = tuple(node.args[0].meta["val"].shape)
                rounded.extend(
                    [shape] if shape[0] == 16 else []
                )  # of 10 tokens, padded; the others are weights
            elif node.target is torch.ops.halo_train.transpose_bytes.default:
                transposed.append(tuple(node.meta["val"].shape))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    # As Inductor partitions: that is where common subexpressions are found.
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert equal(step(compiled, batch(1)), step(plain_twin(model), batch(1)))
    assert len(rounded) == len(transposed) == 4  # of q, k, v; o; gate, up; down
    torch._dynamo.reset()


@pytest.mark.parametrize("x", [torch.ones(4, 39), torch.ones(4, 40).long(), torch.tensor(1.0)])
def test_bad_input_gets_the_message_of_the_plain_path(x: Tensor) -> None:
    model = settled()
    with pytest.raises(ValueError, match="halo_linear: "):
        model[0].q(x)
    assert model[0].q(torch.empty(0, 40)).shape == (0, 40)
