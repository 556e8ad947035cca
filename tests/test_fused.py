"""Norm -> layers and norm -> gated MLP as one function, against float64 and against the layers one by one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halo_train import RECIPES, HaloConfig, halo_linear
from halo_train.config import Recompute
from halo_train.fused import halo_gated_mlp, halo_projections
from halo_train.fused.functions import Layer
from halo_train.fused.norms import Norm
from halo_train.operands import round_weight
from halo_train.quantize import Equalizer, equalizer_exponents

NORMS = ["none", "rms", "gemma", "layer"]
FUSED = ["fp8", "int8", "fp8_plain"]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Case(NamedTuple):
    """Inputs of a gated MLP and of two layers, one with a bias, behind a norm."""

    x: Tensor
    gain: Tensor
    shift: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor

    @staticmethod
    def draw(
        shape: tuple[int, ...] = (3, 7, 32), inner: int = 40, dtype: torch.dtype = torch.float32
    ) -> Case:
        generator = torch.Generator().manual_seed(0)
        k = shape[-1]
        sizes = [shape, (k,), (k,), (inner, k), (inner, k), (20, inner), (20,), (20, k), (20,), (24, k)]
        tensors = [torch.randn(size, generator=generator) for size in sizes]
        tensors[0][..., 3] *= 20
        for i in (3, 4, 5, 7, 9):
            tensors[i] *= 0.2
        tensors[1] = 1 + 0.1 * tensors[1]
        return Case(*(t.to(dtype) for t in tensors))

    def with_grad(self, dtype: torch.dtype | None = None) -> Case:
        return Case(*(t.detach().to(dtype or t.dtype).requires_grad_() for t in self))

    def norm(self, kind: str) -> Norm | None:
        if kind == "none":
            return None
        return Norm(
            self.gain, self.shift if kind == "layer" else None, 1e-5, kind == "layer", kind == "gemma"
        )

    def normed(self, kind: str) -> Tensor:
        """The definition."""
        if kind == "none":
            return self.x
        if kind == "layer":
            return F.layer_norm(self.x, self.x.shape[-1:], self.gain, self.shift, 1e-5)
        unit = self.x * torch.rsqrt(self.x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return unit * (1 + self.gain if kind == "gemma" else self.gain)


def equalizers(case: Case, config: HaloConfig, kind: str) -> tuple[Equalizer | None, Equalizer | None]:
    if not config.equalize:
        return None, None
    y = case.normed(kind).flatten(0, -2)
    weights = torch.cat([case.gate, case.up, case.first, case.second])
    h = F.silu(y @ case.gate.t()) * (y @ case.up.t())
    return (
        Equalizer.of_exponents(equalizer_exponents(y, weights)),
        Equalizer.of_exponents(equalizer_exponents(h, case.down)),
    )


def fused(case: Case, config: HaloConfig, kind: str, activation: str = "silu") -> tuple[Tensor, ...]:
    with torch.no_grad():
        equalizer, inner = equalizers(case, config, kind)
    norm = case.norm(kind)
    y = halo_gated_mlp(
        case.x,
        Layer(case.gate),
        Layer(case.up),
        Layer(case.down, case.down_bias),
        activation=activation,
        config=config,
        equalizer=equalizer,
        down_equalizer=inner,
        norm=norm,
    )
    layers = [Layer(case.first, case.first_bias), Layer(case.second)]
    return y, *halo_projections(case.x, layers, config=config, equalizer=equalizer, norm=norm)


def exact(case: Case, kind: str, activation: str = "silu") -> tuple[Tensor, ...]:
    y = case.normed(kind)
    hidden = ACTIVATIONS[activation](y @ case.gate.t()) * (y @ case.up.t())
    return (
        hidden @ case.down.t() + case.down_bias,
        y @ case.first.t() + case.first_bias,
        y @ case.second.t(),
    )


def one_by_one(case: Case, config: HaloConfig, kind: str) -> tuple[Tensor, ...]:
    with torch.no_grad():
        equalizer, inner = equalizers(case, config, kind)
    y = case.normed(kind)

    def layer(x: Tensor, w: Tensor, bias: Tensor | None = None, e: Equalizer | None = equalizer) -> Tensor:
        return halo_linear(x, w, bias, config=config, equalizer=e)

    hidden = F.silu(layer(y, case.gate)) * layer(y, case.up)
    return (
        layer(hidden, case.down, case.down_bias, inner),
        layer(y, case.first, case.first_bias),
        layer(y, case.second),
    )


def with_gradients(outputs: tuple[Tensor, ...], case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, list(case), seeds, allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("recipe", [*FUSED, "folded"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("shape", "inner"), [((3, 7, 32), 40), ((64, 48), 64), ((1, 16), 3)])
def test_without_rounding_it_is_the_definition(
    recipe: str, kind: str, shape: tuple[int, ...], inner: int
) -> None:
    config = RECIPES["fp8"].with_folded_dgrad if recipe == "folded" else RECIPES[recipe]
    case = Case.draw(shape, inner).with_grad()
    wide = case.with_grad(torch.float64)
    ours = with_gradients(fused(case, config.without_rounding(), kind), case)
    true = with_gradients(exact(wide, kind), wide)
    for mine, want in zip(ours, true, strict=True):
        assert mine.shape == want.shape
        assert relative(mine, want) < 5e-6


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation: str) -> None:
    case = Case.draw().with_grad()
    wide = case.with_grad(torch.float64)
    ours = with_gradients(fused(case, RECIPES["int8"].without_rounding(), "rms", activation), case)
    for mine, want in zip(ours, with_gradients(exact(wide, "rms", activation), wide), strict=True):
        assert relative(mine, want) < 5e-6


def test_a_width_that_needs_padding_without_a_norm() -> None:
    case = Case.draw((5, 23), 9).with_grad()
    wide = case.with_grad(torch.float64)
    ours = with_gradients(fused(case, RECIPES["fp8"].without_rounding(), "none"), case)
    for mine, want in zip(ours, with_gradients(exact(wide, "none"), wide), strict=True):
        assert relative(mine, want) < 5e-6


@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck_in_float64(kind: str) -> None:
    case = Case.draw((3, 16), 5, torch.float64).with_grad()
    config = RECIPES["int8"].without_rounding()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return fused(Case(*tensors), config, kind)

    assert torch.autograd.gradcheck(run, tuple(case), fast_mode=True)


def noise(true: Tensor) -> float:
    """How far errors of equal size may be apart: in a vector of some dozens far, in a matrix not."""
    return 1.1 if true.dim() > 1 else 1.7


@pytest.mark.parametrize("recipe", FUSED)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_as_the_layers_one_by_one(recipe: str, kind: str, dtype: torch.dtype) -> None:
    """In float32 a rounding may fall the other way where two sums differ; in bfloat16 the layers round h and the norm before."""
    config = RECIPES[recipe]
    case = Case.draw((4, 60, 64), 96, dtype).with_grad()
    wide = case.with_grad(torch.float64)
    ours, apart = (with_gradients(run(case, config, kind), case) for run in (fused, one_by_one))
    for mine, other, true in zip(ours, apart, with_gradients(exact(wide, kind), wide), strict=True):
        assert mine.dtype == other.dtype
        if dtype is torch.float32:
            assert relative(mine, other) < 3e-3
        assert relative(mine, true) < noise(true) * relative(other, true) + 1e-6


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[op.name().removeprefix("halo_train::")] += 1
        return op(*args, **(kwargs or {}))


def test_what_is_rounded_and_transposed_how_often() -> None:
    case = Case.draw((16, 32), 64).with_grad()
    layers = [Layer(w) for w in (case.first, case.second, case.gate)]
    with Count() as count:
        outputs = halo_projections(case.x, layers, config=RECIPES["fp8"], norm=case.norm("rms"))
    assert count.ops["norm_quantize"] == 1
    assert count.ops["matmul_weight_rows"] == 3
    with Count() as count:
        torch.autograd.grad(
            outputs, [case.x, case.first, case.second, case.gate], [torch.ones_like(y) for y in outputs]
        )
    assert count.ops["transpose_bytes"] == 1  # X, for three weight gradients
    with Count() as count:
        y = halo_gated_mlp(
            case.x,
            Layer(case.gate),
            Layer(case.up),
            Layer(case.down),
            activation="silu",
            config=RECIPES["fp8"],
            norm=case.norm("rms"),
        )
    assert (count.ops["norm_quantize"], count.ops["gated_quantize"], count.ops["matmul_weight_rows"]) == (
        1,
        1,
        3,
    )
    with Count() as count:
        torch.autograd.grad(y, [case.x, case.gate, case.up, case.down], torch.ones_like(y))
    assert count.ops["gated_grad_quantize"] == 1
    assert count.ops["quantize_grad"] == 1  # of the output
    assert count.ops["transpose_bytes"] == 2  # X, h


def saved_bytes(case: Case, config: HaloConfig) -> int:
    """Besides the inputs."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = fused(case, config, "rms")
    assert len(outputs) == 3  # they are alive, and so is what they saved
    return sum(size for address, size in found.items() if address not in {t.data_ptr() for t in case})


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("trained", ["x", "gain", "gate", "up", "down", "down_bias", "first"])
def test_one_gradient_alone_is_that_of_all_and_saves_no_more(trained: str, recompute: Recompute) -> None:
    config = dataclasses.replace(RECIPES["fp8"], recompute=recompute)
    whole = Case.draw((40, 32), 64).with_grad()
    every = torch.autograd.grad(
        fused(whole, config, "rms")[:2], getattr(whole, trained), [torch.ones(40, 20)] * 2, allow_unused=True
    )
    case = Case(*(t.detach() for t in whole))._replace(**{trained: getattr(whole, trained)})
    outputs = [y for y in fused(case, config, "rms")[:2] if y.requires_grad]
    alone = torch.autograd.grad(outputs, getattr(case, trained), [torch.ones(40, 20)] * len(outputs))
    assert torch.equal(alone[0], every[0])
    some, all_ = saved_bytes(case, config), saved_bytes(whole, config)
    assert some <= all_
    if recompute is Recompute.NOTHING:  # of what the others keep, most is x
        assert some < 0.95 * all_


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_plain"])
def test_what_is_computed_again_has_the_same_bits_and_is_not_kept(
    recipe: str, folded: bool, compiled: bool
) -> None:
    results, kept = [], []
    for recompute in Recompute:
        config = dataclasses.replace(RECIPES[recipe], recompute=recompute, requantize_w_dgrad=not folded)
        case = Case.draw((40, 32), 64).with_grad()
        run = fused
        if compiled:
            torch.compiler.reset()
            run = torch.compile(fused, backend="aot_eager")
        saved: list[Tensor] = []

        def keep(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = run(case, config, "rms")
        results.append(with_gradients(outputs, case))
        # 40 tokens, padded; gate and up are 64 wide.
        kept.append([(t.element_size(), tuple(t.shape)) for t in saved if 48 in t.shape])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    rounded = [[shape for size, shape in shapes if size == 1] for shapes in kept]
    wide = [[shape for size, shape in shapes if 64 in shape and size > 1] for shapes in kept]
    assert len(rounded[0]) >= 2
    assert rounded[1:] == [[], []]
    assert [len(shapes) for shapes in wide] == [2, 2, 0]


def test_an_output_that_nobody_uses() -> None:
    case = Case.draw().with_grad()
    layers = [Layer(case.first, case.first_bias), Layer(case.second)]
    _, second = halo_projections(case.x, layers, config=RECIPES["fp8"], norm=case.norm("rms"))
    grads = torch.autograd.grad(second.sum(), [case.x, case.second, case.first], allow_unused=True)
    assert grads[2] is None
    (alone,) = halo_projections(case.x, layers[1:], config=RECIPES["fp8"], norm=case.norm("rms"))
    for mine, other in zip(grads[:2], torch.autograd.grad(alone.sum(), [case.x, case.second]), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("folded", [False, True])
def test_weights_that_are_rounded_already(folded: bool) -> None:
    config = RECIPES["fp8"].with_folded_dgrad if folded else RECIPES["fp8"]
    case = Case.draw((40, 32), 64).with_grad()
    d = Equalizer.of(torch.exp2(torch.randint(-2, 3, (32,)).float()))
    results = []
    for given in (False, True):
        weights = [
            Layer(w, None, round_weight(w.detach(), d.d, config) if given else None)
            for w in (case.first, case.second)
        ]
        outputs = halo_projections(case.x, weights, config=config, equalizer=d, norm=case.norm("rms"))
        leaves = [case.x, case.first, case.second]
        results.append(
            [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_reads_the_norm_in_float32_and_writes_bfloat16() -> None:
    case = Case.draw((4, 60, 64), 96).with_grad()
    wide = case.with_grad(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = fused(case, RECIPES["int8"], "rms")
        apart = one_by_one(case, RECIPES["int8"], "rms")
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    ours, others = with_gradients(outputs, case), with_gradients(apart, case)
    assert {g.dtype for g in ours[3:]} == {torch.float32}
    for mine, other, true in zip(ours, others, with_gradients(exact(wide, "rms"), wide), strict=True):
        assert relative(mine, true) < noise(true) * relative(other, true) + 1e-6


def test_bad_input() -> None:
    case = Case.draw()
    layers = [Layer(case.first)]
    for recipe, why in (("halo1_fp8", "one scale for a whole tensor"), ("bf16", "does not round")):
        with pytest.raises(ValueError, match=f"halo_projections: recipe {recipe} .*{why}|{why}"):
            halo_projections(case.x, layers, config=RECIPES[recipe])
    with pytest.raises(ValueError, match=r"the weights that read x must be \[N, 32\]; got \[\(20, 40\)\]"):
        halo_projections(case.x, [Layer(case.down)], config=RECIPES["fp8"])
    with pytest.raises(ValueError, match=r"x must not be empty; got shape \(0, 32\)"):
        halo_projections(case.x[0, :0], layers, config=RECIPES["fp8"])
    with pytest.raises(ValueError, match=r"same dtype outside autocast; got torch.bfloat16"):
        halo_projections(case.x.bfloat16(), layers, config=RECIPES["fp8"])
    with pytest.raises(ValueError, match="multiple of 16; got 20"):
        halo_projections(
            torch.randn(3, 20), [Layer(torch.randn(4, 20))], config=RECIPES["fp8"], norm=case.norm("rms")
        )
    mlp: dict[str, Any] = {"activation": "silu", "config": RECIPES["fp8"]}
    with pytest.raises(ValueError, match="gate and up must have no bias"):
        halo_gated_mlp(case.x, Layer(case.gate, torch.ones(40)), Layer(case.up), Layer(case.down), **mlp)
    with pytest.raises(ValueError, match=r"\[F, K\], \[F, K\] and \[N, F\]; got"):
        halo_gated_mlp(case.x, Layer(case.gate), Layer(case.first), Layer(case.down), **mlp)
