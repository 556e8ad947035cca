"""Swapping the nn.Linear layers of a model for HaloLinear and back, with a report of every layer and the reason why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .agreement import Conversion, describe
from .blocks.recognise import FusedPart, UnfusedPart, fuse_blocks, unfuse
from .config import Format, HaloConfig, Recompute, parse_choice, resolve_recipe
from .cost import measured_rates, predicted_speedup
from .linear import HaloLinear
from .recipe_file import LayerRecipes, check_patterns, recipe_of_layer
from .shared_input import SharedInputs

MIN_FEATURES = 16
"""A layer with fewer in or out features would be mostly padding; the default filter leaves it alone."""

_OUTPUT_NAMES = ("lm_head", "embed_out", "output_projection", "classifier", "score")
"""Last components of the names under which models keep their output layer."""

_INT8_STEPS = 254
"""Of the largest magnitude of a row: what is below one half of a step is zero."""

_ADAPTER_PARTS = {"lora_A", "lora_B"}
"""Components of the names under which the peft library keeps the two factors of an adapter."""


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """A layer that now runs the recipe."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    recipe: str


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """A module with matrix weights that was left as it is."""

    name: str
    shape: tuple[int, ...]
    """Shape of its largest weight."""
    reason: str


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_to_halo_training` did: every module with a matrix weight is in one of the two lists."""

    converted: list[ConvertedLayer]
    skipped: list[SkippedLayer]
    fused: list[FusedPart] = dataclasses.field(default_factory=list)
    unfused: list[UnfusedPart] = dataclasses.field(default_factory=list)
    """Parts of transformer blocks (:mod:`halo_train.blocks.recognise`); both empty with ``fuse=False``."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        recipes = sorted({layer.recipe for layer in self.converted})
        lines = [
            f"{len(self.converted)} linear layers run {', '.join(recipes)}; {len(self.skipped)} modules left alone"
        ]
        names = [layer.name for layer in self.converted] + [skip.name for skip in self.skipped]
        width = max(map(len, names), default=0)
        for layer in self.converted:
            lines.append(f"  {layer.name:<{width}}  {_dims(layer.shape):>16}  {layer.recipe}")
        for skip in self.skipped:
            lines.append(f"  {skip.name:<{width}}  {_dims(skip.shape):>16}  skipped: {skip.reason}")
        for part in self.fused:
            lines.append(f"  {part.name:<{width}}  fused: {part.what}")
        for left in self.unfused:
            lines.append(f"  {left.name:<{width}}  not fused: {left.reason}")
        return "\n".join(lines)


def convert_to_halo_training(
    module: nn.Module,
    *,
    recipe: str | HaloConfig | LayerRecipes = "fp8",
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    output_layer: bool = False,
    tokens: int | None = None,
    share_inputs: bool = False,
    fuse: bool = True,
    recompute: str | Recompute | None = None,
) -> ConversionReport:
    """Replaces the linear layers inside ``module`` by HaloLinear, in place, sharing their parameters.

    By default the output layer (lm_head), layers tied to an embedding, adapters of the peft library and layers with fewer
    than 16 in or out features stay in high precision. Call it before FSDP, DDP and torch.compile.

    Args:
        module: any model that contains nn.Linear.
        recipe: a recipe name (``halo_train.RECIPES``), a HaloConfig, or a mapping of layer name patterns to them, of which
            the first that matches decides; a layer that none matches is left alone. ``load_recipe`` reads one from a file.
        module_filter_fn: (layer, name) -> True to convert; replaces the default choice. It is asked only about layers
            that can be converted.
        output_layer: True converts that too, tied to an embedding or not; with float32 sums, and in e4m3 where its recipe is one
            in int8. What it costs in accuracy: docs/numerics.md, section 8.
        tokens: how many a layer sees at once (micro-batch times length). With it, layers that would be slower in 8 bits than
            in bfloat16 are left alone, on GPUs whose rates are known (:mod:`halo_train.cost`).
        share_inputs: for models whose blocks are not fused: layers that read the same tensor, as q, k and v do, rotate, round
            and save it once, from the second step on with one equalisation vector over all their weights. Eager forwards find them;
            compiled code shares what was found and settled before (``equalizer_state_dict`` settles too). Under FSDP2 each layer
            rounds its input itself, and so do those whose first forward was compiled or in inference mode.
            It gains 1% of an eager step of a Llama on an H200, fusing 11%.
        fuse: norms and gated MLPs of transformers' Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and 3, Phi and Phi-3 write what
            they compute in 8 bits for the layers that read it, as far as they are as transformers makes them
            (docs/blocks.md); the report says which. The values are those of the layers one by one, rounded once less.
        recompute: ``inputs`` or ``mlp`` keep less for backward and compute it once more, to the same bits
            (:class:`halo_train.config.Recompute`); ``nothing`` keeps it. None is what the recipe says, for named recipes nothing.

    Returns:
        The report; print it.

    Raises:
        ValueError: unknown recipe; a bare nn.Linear; no linear layer; every linear layer was filtered out; a pattern that
            matches no layer; an output layer that was asked for and cannot be converted. The module is unchanged then.
        TypeError: module is no nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_to_halo_training: module must be an nn.Module; got {type(module).__name__}")
    recipes = recipe if isinstance(recipe, Mapping) else {"*": resolve_recipe(recipe)}
    again = None if recompute is None else parse_choice(Recompute, "recompute", recompute)
    if output_layer and module_filter_fn is not None:
        raise ValueError(
            "convert_to_halo_training: output_layer=True is part of the default choice, which module_filter_fn replaces; let "
            "module_filter_fn return True for the output layer instead"
        )
    if isinstance(module, nn.Linear):
        raise ValueError(
            "convert_to_halo_training: module must contain linear layers, but it is one itself, which cannot be replaced "
            "in place; use HaloLinear.from_linear(module, recipe)"
        )
    chosen: list[tuple[str, nn.Linear]] = []
    skipped: list[SkippedLayer] = []
    exclusion = _Exclusion(module)
    for name, child in module.named_modules():
        shapes = [tuple(p.shape) for p in child.parameters(recurse=False) if p.dim() >= 2]
        if not shapes:
            continue
        reason = exclusion.why_not(child)
        if not reason and module_filter_fn is not None:
            reason = "" if module_filter_fn(child, name) else "module_filter_fn returned False"
        elif not reason:
            reason = exclusion.why_not_by_default(child, name, output_layer)
        if reason:
            skipped.append(SkippedLayer(name, max(shapes), reason))
        else:
            assert isinstance(child, nn.Linear)
            chosen.append((name, child))
    if not chosen:
        raise ValueError(_nothing_to_convert(module, skipped))
    if output_layer and not any(exclusion.is_output(layer, name) for name, layer in chosen):
        raise ValueError(_no_output_layer(module, skipped))
    check_patterns(recipes, (name for name, _ in chosen))
    shared_inputs = SharedInputs() if share_inputs else None
    converted: list[ConvertedLayer] = []
    replacements: dict[int, HaloLinear] = {}
    for name, layer in chosen:
        shape = (layer.out_features, layer.in_features)
        config = recipe_of_layer(recipes, name)
        if config is not None and again is not None and config.format is not Format.HIGH_PRECISION:
            config = dataclasses.replace(config, recompute=again)
        if config is not None and exclusion.is_output(layer, name):
            config = _of_output_layer(layer, name, config, output_layer)
        if config is None and output_layer and exclusion.is_output(layer, name):
            raise ValueError(
                f"convert_to_halo_training: output_layer=True needs a recipe for the output layer {name!r}; no pattern of "
                f"{', '.join(map(repr, recipes))} matches it; add {{{name!r}: 'fp8'}}, or leave output_layer out"
            )
        if config is None:
            skipped.append(SkippedLayer(name, shape, "no pattern of the recipe matches its name"))
        elif slower := _why_slower(layer, config, tokens):
            skipped.append(SkippedLayer(name, shape, slower))
        else:
            converted.append(ConvertedLayer(name, shape, config.name))
            replacements[id(layer)] = new = HaloLinear.from_linear(layer, config)
            new.fqn = name
            new.tied = exclusion.embedding_of(layer) is not None
            new.shared_inputs = shared_inputs
    if not converted:
        raise ValueError(_nothing_to_convert(module, skipped))
    _replace(module, replacements)
    fused, unfused = fuse_blocks(module) if fuse else ([], [])
    conversion = Conversion([describe(layer) for layer in replacements.values()])
    for layer in replacements.values():
        layer.conversion = conversion
    return ConversionReport(converted, skipped, fused, unfused)


def revert(module: nn.Module) -> nn.Module:
    """Replaces every HaloLinear inside ``module`` by nn.Linear, in place, sharing the parameters, and takes fused parts apart.

    Returns:
        ``module``; for a bare HaloLinear its nn.Linear.

    Raises:
        ValueError: FSDP2 has sharded a layer. The module is unchanged then.
    """
    if isinstance(module, HaloLinear):
        return module.to_linear()
    linears = {id(m): m.to_linear() for m in module.modules() if isinstance(m, HaloLinear)}
    unfuse(module)
    _replace(module, linears)
    return module


class _Exclusion:
    """Why a module is not converted, given the model it is in."""

    def __init__(self, model: nn.Module) -> None:
        self._embeddings = {
            id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
        }
        self._outputs = set()
        for m in model.modules():
            # transformers' own name for "the layer that produces the logits", whatever the attribute is called.
            get_output = getattr(m, "get_output_embeddings", None)
            if callable(get_output):
                self._outputs.add(id(get_output()))

    def is_output(self, module: nn.Module, name: str) -> bool:
        """Whether it produces the logits."""
        return id(module) in self._outputs or name.rpartition(".")[2] in _OUTPUT_NAMES

    def embedding_of(self, module: nn.Linear) -> str | None:
        """Name of the embedding that has the same weight."""
        return self._embeddings.get(id(module.weight))

    def why_not(self, module: nn.Module) -> str:
        """Reasons that no filter overrides."""
        kind = type(module).__name__
        if isinstance(module, nn.Embedding):
            return "an embedding is a table look-up, not a matrix product"
        if isinstance(module, HaloLinear):
            return f"already converted (recipe={module.config.name}); revert() the model first"
        if not isinstance(module, nn.Linear):
            if any(p.dim() == 3 for p in module.parameters(recurse=False)):
                return f"{kind} keeps a stack of matrices in one parameter and multiplies them itself"
            return f"{kind} is not nn.Linear and multiplies its weight itself"
        if type(module) is not nn.Linear:
            return f"{kind} is a subclass of nn.Linear, whose own forward would be lost"
        if "forward" in vars(module):
            return "its forward is overridden on the instance, which would bypass HaloLinear"
        return ""

    def why_not_by_default(self, module: nn.Module, name: str, output_layer: bool) -> str:
        """Reasons of the default filter."""
        assert isinstance(module, nn.Linear)
        if output_layer and self.is_output(module, name):
            return ""
        if (embedding := self.embedding_of(module)) is not None:
            return f"weight tied to the embedding {embedding!r}"
        if self.is_output(module, name):
            return "output layer: its rounding errors enter the loss directly"
        if _ADAPTER_PARTS & set(name.split(".")):
            return "low-rank adapter: what it learns is small beside the layer it adapts, and so is its share of the time"
        if min(module.in_features, module.out_features) < MIN_FEATURES:
            return f"fewer than {MIN_FEATURES} in or out features: it would be mostly padding"
        return ""


def _of_output_layer(layer: nn.Linear, name: str, config: HaloConfig, chosen_by_default: bool) -> HaloConfig:
    """A recipe as an output layer runs it: docs/numerics.md, section 8. int8 rounds all probabilities below 1/254 of a token's largest
    to zero, and training stands still; sums of few large and very many small terms need more bits than fast ones have. Nobody else keeps its
    input for backward, so that keeping it rounded takes least."""
    if config.grad_format is Format.INT8 and layer.out_features > _INT8_STEPS:
        if not chosen_by_default:
            raise ValueError(
                f"convert_to_halo_training: {name} is an output layer of {layer.out_features} words, and {config.name} would round "
                f"their probabilities below 1/{_INT8_STEPS} to zero in backward; give it another recipe, {{{name!r}: 'fp8', '*': "
                f"{config.name!r}}}, or take output_layer=True instead of module_filter_fn"
            )
        config = dataclasses.replace(config, format=Format.E4M3, grad_format=Format.E4M3)
    in_float8 = config.grad_format in (Format.E4M3, Format.E5M2)
    fast_accum = config.fast_accum and not in_float8
    return dataclasses.replace(config, fast_accum=fast_accum, recompute=Recompute.NOTHING)


def _why_slower(layer: nn.Linear, config: HaloConfig, tokens: int | None) -> str:
    rates = None if tokens is None else measured_rates(layer.weight.device)
    if tokens is None or rates is None:
        return ""
    speedup = predicted_speedup(tokens, (layer.out_features, layer.in_features), config, rates)
    return (
        ""
        if speedup >= 1
        else f"{config.name} would run at {speedup:.2f} times the speed of bf16 with {tokens} tokens"
    )


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    # A layer can hang in several places; all of them get the same replacement.
    for parent in list(model.modules()):
        # Not named_children(): it names a child that hangs twice in one parent only once.
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _nothing_to_convert(module: nn.Module, skipped: list[SkippedLayer]) -> str:
    kind = type(module).__name__
    if not skipped:
        return f"convert_to_halo_training: module must contain an nn.Linear; {kind} has no module with a matrix weight"
    lines = [f"  {s.name or '(root)'}: {s.reason}" for s in skipped[:8]]
    more = f"\n  ... and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    return (
        f"convert_to_halo_training: no layer of {kind} is converted, so nothing would run in low precision; pass "
        "module_filter_fn, or leave out tokens, to choose layers yourself. Skipped:\n"
        + "\n".join(lines)
        + more
    )


def _no_output_layer(module: nn.Module, skipped: list[SkippedLayer]) -> str:
    found = "; ".join(f"{s.name}: {s.reason}" for s in skipped if s.name.rpartition(".")[2] in _OUTPUT_NAMES)
    return (
        f"convert_to_halo_training: output_layer=True needs an output layer of {type(module).__name__} that can be converted; "
        f"{found or 'none was found'}; leave output_layer out"
    )


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
