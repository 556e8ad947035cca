"""Layers whose gradients have a scale for each row and block of the contraction, as on Hopper, with the reference on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from halo_train import (
    RECIPES,
    convert_to_halo_training,
    equalizer_state_dict,
    halo_linear,
    load_equalizer_state_dict,
    ops,
)
from halo_train import (
    operands as operands_module,
)
from halo_train.fused import Layer, Norm, halo_projections
from halo_train.operands import round_grad, round_weight, takes_input_columns

CONFIGS = {
    "fp8": RECIPES["fp8"],
    "fp8, folded": RECIPES["fp8"].with_folded_dgrad,
    "fp8_plain": RECIPES["fp8_plain"],
}
SHAPES = [(300, 528, 64), (257, 48, 33), (16, 16, 272), (1, 300, 16)]


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "takes_blocks", lambda e: e.dtype != torch.float64)


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))


def grads(function, x: Tensor, w: Tensor, b: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    return torch.autograd.grad(function(*leaves), leaves, e)


def decibels(rounded: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return 20 * torch.log10(exact.norm() / (rounded.double() - exact).norm()).item()


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("recipe", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_as_exact_as_those_of_row_scales(recipe, shape, dtype, monkeypatch):
    x, w, b, e = operands(*shape, dtype=dtype)
    exact = grads(F.linear, x.double(), w.double(), b.double(), e.double())

    def layer(*t):
        return halo_linear(*t, config=CONFIGS[recipe])

    ours = grads(layer, x, w, b, e)
    monkeypatch.setattr(ops, "takes_blocks", lambda e: False)
    rows = grads(layer, x, w, b, e)
    for mine, other, true in zip(ours, rows, exact, strict=True):
        assert mine.shape == true.shape
        # Of rows of 16 the largest value has an error too, as the scale is no quotient of it.
        assert decibels(mine, true) > min(decibels(other, true) - 0.5, 27.5)
    assert not torch.equal(ours[0], rows[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", CONFIGS)
def test_one_operator_has_the_bits_of_its_steps(recipe, shape, monkeypatch):
    x, w, b, e = operands(*shape)
    d = torch.exp2(torch.randint(-3, 4, (shape[2],)).float()) if CONFIGS[recipe].equalize else None

    def layer(*t):
        return halo_linear(*t, config=CONFIGS[recipe], equalizer=d)

    alone = grads(layer, x, w, b, e)
    monkeypatch.setattr("halo_train.products._are_operators_seen", lambda: True)
    for mine, other in zip(alone, grads(layer, x, w, b, e), strict=True):
        assert torch.equal(mine, other)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mine, other in zip(alone, grads(compiled, x, w, b, e), strict=True):
        assert torch.equal(mine, other)


def dgrad(w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E W exactly, and of E in blocks with a scale for each tile of W and for each column."""
    rows, scales, *_ = ops.quantize_grad_blocks(e, torch.float8_e4m3fn, None, torch.ones(e.shape[0]))
    tiles = ops.matmul_weight_columns(rows, scales, w, None, torch.float8_e4m3fn, torch.float32)
    data, of_columns = ops.quantize_rows_transposed(w, torch.float8_e4m3fn, None)
    columns = ops.scaled_matmul(rows, data, scales, of_columns, torch.float32)
    return e.double() @ w.double(), tiles, columns


@pytest.mark.parametrize("size", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(64, 768, 600), (40, 300, 1040)])
def test_scales_of_tiles_are_as_exact_as_those_of_columns(shape, size):
    torch.manual_seed(0)
    m, n, k = shape
    w, e = size * torch.randn(n, k), torch.randn(m, n)
    exact, tiles, columns = dgrad(w, e)
    assert decibels(tiles, exact) > decibels(columns, exact) - 0.3
    # Six rows with all the energy of their columns: the largest value of each is exact where the column's scale is made from it.
    w[:6] *= 64
    exact, tiles, columns = dgrad(w, e)
    assert decibels(tiles, exact) > min(decibels(columns, exact) - 0.3, 27.5)
    e[:, :6] = 0
    exact, tiles, columns = dgrad(w, e)
    assert decibels(tiles, exact) > decibels(columns, exact) - 0.3


def test_small_columns_of_a_tile():
    torch.manual_seed(0)
    exponents = torch.randint(-6, 7, (600,))
    # Values up to 448 / 1.75 / 2^k: the scale is 1, and the smallest columns, of deviation 2^-6 / 2^k, are where e4m3 loses bits.
    exact, tiles, columns = dgrad(torch.randn(768, 600) * torch.exp2(exponents.float()), torch.randn(64, 768))
    assert decibels(tiles, exact) > decibels(columns, exact) - 0.3
    for exponent in range(-6, 7):
        of = exponents == exponent
        mine, other = decibels(tiles[:, of], exact[:, of]), decibels(columns[:, of], exact[:, of])
        assert mine > other - (0.5 if exponent > -5 else 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("equalized", [False, True])
def test_a_weight_rounded_before_has_the_bits_of_one_rounded_in_backward(shape, equalized):
    x, w, b, e = operands(*shape)
    config = RECIPES["fp8"]
    d = torch.exp2(torch.randint(-3, 4, (shape[2],)).float()) if equalized else None
    with torch.no_grad():
        rounded = round_weight(w.requires_grad_(), d, config)
    assert rounded.columns.scale.dim() == 2
    here = grads(lambda *t: halo_linear(*t, config=config, equalizer=d), x, w, b, e)
    before = grads(lambda *t: halo_linear(*t, config=config, equalizer=d, rounded_weight=rounded), x, w, b, e)
    for mine, other in zip(before, here, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("trained", [False, True])
def test_dgrad_alone_by_a_weight_rounded_before(trained):
    x, w, b, e = operands(300, 528, 64)
    config = RECIPES["fp8"]
    with torch.no_grad():
        rounded = round_weight(w.requires_grad_(trained), None, config)
    assert rounded.columns.scale.dim() == (2 if trained else 1)
    x.requires_grad_()
    y = halo_linear(x, w, b, config=config, rounded_weight=rounded)
    (dx,) = torch.autograd.grad(y, x, e)
    assert decibels(dx, e.double() @ w.detach().double()) > 27.5
    if trained:  # the bits of a backward that makes dW, too
        y = halo_linear(x, w, b, config=config, rounded_weight=rounded)
        assert torch.equal(torch.autograd.grad(y, (x, w), e)[0], dx)


def outliers(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """X with channels and tokens far above the others, W and E with tokens of all magnitudes."""
    generator = torch.Generator().manual_seed(1)
    x, w, _, e = operands(m, n, k)
    x[:, ::97] *= 64
    x *= torch.randn(m, 1, generator=generator).exp()
    x[::151] *= 1000
    return x, w, e * torch.randn(m, 1, generator=generator).mul(3).exp()


def grads_of_weight(x: Tensor, w: Tensor, e: Tensor, **options) -> Tensor:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    halo_linear(x, w, **options).backward(e)
    return w.grad


@pytest.mark.parametrize("equalized", [False, True])
def test_wgrad_by_columns_loses_no_channel(equalized, monkeypatch):
    """As exact as rows that are not rotated; rotated ones spread the errors of large channels over the others."""
    x, w, e = outliers(1024, 320, 512)
    d = torch.exp2((torch.arange(512) % 97 == 0).float() * 3) if equalized else None
    exact = e.double().t() @ x.double()

    def of_channels(recipe: str, d: Tensor | None) -> tuple[float, Tensor]:
        dw = grads_of_weight(x, w, e, config=RECIPES[recipe], equalizer=d)
        errors = (dw.double() - exact).norm(dim=0) / exact.norm(dim=0)
        return decibels(dw, exact), -20 * torch.log10(errors)

    all_columns, columns = of_channels("fp8", d)
    monkeypatch.setattr("halo_train.functional.takes_input_columns", lambda *_: False)
    _, rotated = of_channels("fp8", d)
    all_plain, plain = of_channels("fp8_plain", None)
    assert all_columns > all_plain - 1
    assert columns.median() > max(plain.median() - 0.3, rotated.median() + 1)
    assert columns.min() > max(plain.min() - 1, rotated.min() + 4)


@pytest.mark.parametrize("recipe", ["fp8", "fp8, folded"])
def test_wgrad_by_columns_keeps_a_byte_an_element(recipe):
    x, w, b, e = operands(640, 256, 512)
    d = torch.exp2(torch.randint(-3, 4, (512,)).float())
    kept: dict[int, Tensor] = {}
    x.requires_grad_()
    w.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        y = halo_linear(x, w, b, config=CONFIGS[recipe], equalizer=d)
    of_x = [t for t in kept.values() if t.shape == (512, 640)]
    assert [t.element_size() for t in of_x] == [1]
    of_w = [t for t in kept.values() if t.shape == w.shape]
    rest = sum(t.nbytes for t in kept.values()) - sum(t.nbytes for t in of_x + of_w)
    assert rest <= 4 * (640 + 256 + 512) + 4 * 3 * 2
    # Gradients of one alone are those of both.
    dx, dw = torch.autograd.grad(y, (x, w), e, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, e, retain_graph=True)[0], dx)
    assert torch.equal(torch.autograd.grad(y, w, e)[0], dw)


def test_wgrad_by_columns_of_an_input_that_is_rounded_again():
    x, w, _, e = operands(300, 528, 64)
    once = grads_of_weight(x, w, e, config=RECIPES["fp8"])
    assert torch.equal(grads_of_weight(x, w, e, config=RECIPES["fp8"].with_recomputed_inputs), once)


class Readers(nn.Module):
    """Two layers that read the same: of 100 tokens the second one's weight has too few rows for a wgrad by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 64), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x)], -1)


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_share_an_input_have_the_bits_of_those_that_do_not(autocast, monkeypatch):
    torch.manual_seed(0)
    x, shared = torch.randn(2, 50, 48), Readers()
    apart = copy.deepcopy(shared)
    convert_to_halo_training(shared, recipe="fp8", share_inputs=True)
    convert_to_halo_training(apart, recipe="fp8", share_inputs=False)
    rounded: list[tuple[int, ...]] = []
    original = operands_module.quantize_tiles
    monkeypatch.setattr(
        operands_module,
        "quantize_tiles",
        lambda x, *rest: rounded.append(tuple(x.shape)) or original(x, *rest),
    )

    def step(model: nn.Module) -> list[Tensor]:
        tokens = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(tokens)
        y.float().square().sum().backward()
        found = [tokens.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        return found

    step(shared)  # takes the factors
    optimizer = torch.optim.SGD(shared.parameters(), 0.0)
    optimizer.step()
    step(shared)
    load_equalizer_state_dict(apart, equalizer_state_dict(shared))
    rounded.clear()
    ours = step(shared)
    assert rounded == [(112, 48)]  # W is rounded in the operator that multiplies
    theirs = step(apart)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        rounded.clear()
        shared(x)
        apart(x)
        assert not rounded


@pytest.mark.parametrize("m", [256, 257])
def test_wgrad_takes_columns_where_they_are_no_more_bytes(m):
    x, recipe = torch.empty(m, 48), RECIPES["fp8"]
    assert takes_input_columns(x, 64, recipe) is (m == 256)
    assert takes_input_columns(x, 64, recipe.with_recomputed_inputs) is (m == 256)
    assert not takes_input_columns(x, 64, RECIPES["fp8_plain"])
    assert not takes_input_columns(x, 64, RECIPES["int8"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_an_input_surfaces(bad):
    x, w, _, e = operands(300, 528, 64)
    x[7, 5] = bad
    assert not grads_of_weight(x, w, e, config=RECIPES["fp8"]).isfinite().any()


def test_blocks_of_other_magnitudes_keep_their_bits():
    """Where the columns of E differ by 2^21, e4m3 with a scale a row has no bits left for some."""
    *_, e = operands(1024, 1024, 64)
    e = e * torch.exp2(torch.arange(4) * 7.0 - 14).repeat_interleave(256)
    for_dx, for_dw, _ = round_grad(e, None, torch.ones(1024), True, True, False, RECIPES["fp8"])
    parts = zip(for_dx.dequantize().split(256, 1), e.split(256, 1), strict=True)
    assert min(decibels(mine, true) for mine, true in parts) > 30
    assert decibels(for_dw.dequantize(), e.t()) > 30


def test_frozen_weights_and_inputs_without_gradient():
    x, w, b, e = operands(300, 272, 64)
    exact = grads(F.linear, x, w, b, e)
    frozen = x.clone().requires_grad_()
    halo_linear(frozen, w, b, config=RECIPES["fp8"]).backward(e)
    assert decibels(frozen.grad, exact[0]) > 25
    trained = w.clone().requires_grad_()
    halo_linear(x, trained, b, config=RECIPES["fp8"]).backward(e)
    assert decibels(trained.grad, exact[1]) > 25


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_gradient_surfaces(bad):
    x, w, b, e = operands(300, 528, 64)
    e[7, 500] = bad
    dx, dw, _ = grads(lambda *t: halo_linear(*t, config=RECIPES["fp8"]), x, w, b, e)
    assert not dx[7].isfinite().any()
    assert not dw[500].isfinite().any()
    assert dx[:7].isfinite().all()
    assert dw[:500].isfinite().all()


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("recipe", ["fp8", "fp8, folded"])
def test_readers_of_a_norm_take_its_columns_and_keep_no_rounded_output(recipe, unit_offset, monkeypatch):
    m, k, sizes = 300, 512, (96, 48)
    generator = torch.Generator().manual_seed(0)
    x, gain, *weights = (
        torch.randn(s, generator=generator) for s in ((m, k), (k,), *((n, k) for n in sizes))
    )
    x[::50] *= 1000
    gain = gain.mul(0.3).exp() - float(unit_offset)
    gain[::97] *= 64
    gradients = [torch.randn(m, n, generator=generator) for n in sizes]
    leaves = [t.requires_grad_() for t in (x, gain, *weights)]
    norm = Norm(gain, None, 1e-6, unit_offset=unit_offset)
    kept: list[Tensor] = []

    def all_grads() -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            outputs = halo_projections(x, [Layer(w) for w in weights], config=CONFIGS[recipe], norm=norm)
        return torch.autograd.grad(outputs, leaves, gradients)

    found = all_grads()
    of_x = {(t.element_size(), t.data_ptr() == x.data_ptr()) for t in kept if t.numel() >= m * k}
    assert of_x == {(4, True)}
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = F.rms_norm(wide[0], (k,), 1 + wide[1] if unit_offset else wide[1], 1e-6)
    exact = torch.autograd.grad([y @ w.t() for w in wide[2:]], wide, [e.double() for e in gradients])
    for mine, true in zip(found[2:], exact[2:], strict=True):
        assert (-20 * torch.log10((mine.double() - true).norm(dim=0) / true.norm(dim=0))).min() > 24
    monkeypatch.setattr("halo_train.fused.inputs.takes_input_columns", lambda *_: False)
    for mine, other in zip(found[:2], all_grads()[:2], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_blocks(compiled):
    def model(**options):
        transformers.set_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            use_cache=False,
        )  # fmt: skip
        built = transformers.AutoModelForCausalLM.from_config(config)
        if options:
            convert_to_halo_training(built, **options)
        return built

    ids = torch.randint(1, 64, (2, 150), generator=torch.Generator().manual_seed(0))

    def gradients(built: nn.Module) -> dict[str, Tensor]:
        built(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in built.named_parameters()}

    exact = gradients(model())
    fused, apart = model(recipe="fp8", fuse=True), model(recipe="fp8", fuse=False)
    if compiled:
        torch.compiler.reset()
        for block in fused.model.layers:
            block.compile(backend="aot_eager")
    fused, apart = gradients(fused), gradients(apart)
    for name, true in exact.items():
        assert decibels(fused[name.replace("._orig_mod", "")], true) > decibels(apart[name], true) - 3
