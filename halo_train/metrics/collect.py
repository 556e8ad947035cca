"""QuantMetrics: samples the quantisation error of every layer every so many steps of a training loop."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from torch import nn

from ..config import HaloConfig, did_you_mean, resolve_recipe
from ..linear import HaloLinear, halo_linears
from .batches import Batches
from .plan import Plan
from .products import PRODUCTS
from .sample import STATS, TENSORS, QuantSample, SampleSize, Values
from .statistics import STATS_OF, finish
from .step import SampledStep, run_compiled_regions_eagerly

Sink = Callable[[QuantSample], None]
"""Something that a sampled step is handed to; :mod:`halo_train.metrics.sinks` has several."""


class QuantMetrics:
    """Measures what 8 bits cost, layer by layer, while a model trains; works with any training loop.

    Call :meth:`step` once after every backward. Steps 1, ``every``, 2 ``every``, ... are sampled: hooks are on the layers
    during them and at no other time. In a sampled step each layer is measured in its first forward with gradients, and
    compiled regions run eagerly (``torch.compiler.set_stance``), since a compiled graph has no place to look into; the next
    sampled step begins where :meth:`step` ends the one before it. :meth:`close`, the end of a ``with`` block and the deletion of the
    object end it. Random numbers come from a generator of its own; the step trains exactly as it would without the metrics.

    Args:
        model: converted by convert_to_halo_training; before or after torch.compile, FSDP2 or DDP.
        every: steps between samples.
        layers: patterns (``fnmatch``) on layer names; a layer that matches one is measured.
        stats: names out of :data:`halo_train.metrics.sample.STATS` to keep; None is all.
        what_if: recipes that are measured on the same X, W and E beside the one that runs.
        sinks: called with each :class:`QuantSample`.
        sample_size: tokens and output features in a sampled block; a quarter as many input features.
        start_step: steps done before, for a run that is resumed.

    Raises:
        ValueError: no HaloLinear, a pattern that matches none, an unknown stat or recipe, every or sample_size too small.
        TypeError: every is no integer, a string or single sink in place of several, a sink that cannot be called.
    """

    last: QuantSample | None = None
    """The newest sample; what :meth:`step` returns is ``last.flat()``."""

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        layers: Sequence[str] = ("*",),
        stats: Sequence[str] | None = None,
        what_if: Sequence[str | HaloConfig] = ("halo0_fp8", "fp8", "int8"),
        sinks: Iterable[Sink] = (),
        sample_size: int = 256,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        for name, several in {"layers": layers, "stats": stats, "what_if": what_if}.items():
            if isinstance(several, str):
                raise TypeError(
                    f"QuantMetrics: {name} must be a sequence of names; got the string {several!r}; write [{several!r}]"
                )
        if not isinstance(every, int):
            raise TypeError(f"QuantMetrics: every must be an integer, a number of steps; got {every!r}")
        if every < 1 or sample_size < 4:
            raise ValueError(
                f"QuantMetrics: every must be at least 1 and sample_size at least 4; got {every} and {sample_size}"
            )
        self.layers = _choose(model, layers)
        self.every, self.sinks, self.step_number = every, _callables(sinks), start_step
        self.size = SampleSize(sample_size, sample_size, sample_size // 4)
        self._stats = _known_stats(stats)
        recipes = {config.name: config for config in map(resolve_recipe, what_if)}
        # Cached: layers of one plan are reduced together.
        self._plan = functools.cache(functools.partial(Plan.of, what_if=recipes))
        labels = ("", *(f"@{name}" for name in recipes))
        self._parts = (*TENSORS, *(product + label for product in PRODUCTS for label in labels))
        self._seed = seed
        self._sampled: SampledStep | None = None
        self._hooks = contextlib.ExitStack()
        # Or a loop that just drops the object would leave torch.compile off in its process.
        weakref.finalize(self, self._hooks.close).atexit = False
        self._begin_step()

    def step(self) -> dict[str, float]:
        """Ends a training step.

        Returns:
            After a sampled step ``{"quant/<layer>/<tensor or product>/<stat>": value}`` with the aggregates
            ``quant/worst_layer/...`` and ``quant/median_layer/...``; ``{}`` after any other.
        """
        self.step_number += 1
        sampled = self._sampled
        self.close()
        self._begin_step()
        if sampled is None:
            return {}
        if not sampled.measured:
            warnings.warn(
                f"QuantMetrics: step {self.step_number} was to be sampled, but no measured layer ran forward and backward in "
                "it; call step() once after each backward()",
                stacklevel=2,
            )
            return {}
        self.last = self._read(sampled.measured, sampled.batches)
        for sink in self.sinks:
            sink(self.last)
        return self.last.flat()

    def close(self) -> None:
        """Takes the hooks off; what the current step measured so far is dropped."""
        self._sampled = None
        self._hooks.close()

    def __enter__(self) -> QuantMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_step(self) -> None:
        following = self.step_number + 1
        if following > 1 and following % self.every:
            return
        self._sampled = SampledStep(self.size, self._seed + self.step_number, self._plan)
        # Nothing here refers to this object: its deletion has to end the step.
        self._hooks.callback(run_compiled_regions_eagerly())
        for name, layer in self.layers.items():
            self._hooks.callback(layer.register_operand_hook(self._sampled.hook(name)).remove)

    def _read(self, measured: set[str], batches: Batches) -> QuantSample:
        """Finishes the statistics of the layers, which waits for the GPU."""
        batches.flush()
        found: Values = {layer: {} for layer in self.layers}
        histograms: dict[str, dict[str, list[float]]] = {layer: {} for layer in self.layers}
        for layer, part, kind, vector in finish(batches.found):
            if kind == "exponents":
                histograms[layer][part] = vector
            else:
                stats = found[layer].setdefault(part, {})
                stats.update(zip(STATS_OF[kind], vector, strict=True))
        values: Values = {}
        for layer, of_layer in found.items():
            if layer in measured:
                parts = (part for part in self._parts if part in of_layer)
                values[layer] = {part: self._kept(of_layer[part]) for part in parts}
        recipes = {layer: self.layers[layer].config.name for layer in values}
        return QuantSample(self.step_number, self.size, recipes, values, {k: histograms[k] for k in values})

    def _kept(self, stats: dict[str, float]) -> dict[str, float]:
        if len(self._stats) == len(STATS):
            return stats
        return {name: value for name, value in stats.items() if name in self._stats}


def _choose(model: nn.Module, patterns: Sequence[str]) -> dict[str, HaloLinear]:
    layers = dict(halo_linears(model))
    if not layers:
        raise ValueError("QuantMetrics: the model has no HaloLinear; call convert_to_halo_training first")
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"QuantMetrics: layers: {pattern!r} matches none of the {len(layers)} HaloLinear layers, e.g. "
                f"{next(iter(layers))!r}{did_you_mean(pattern, layers)}"
            )
    return {name: m for name, m in layers.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _callables(sinks: Iterable[Sink]) -> tuple[Sink, ...]:
    found = () if callable(sinks) else tuple(sinks)
    if callable(sinks) or not all(map(callable, found)):
        raise TypeError(
            f"QuantMetrics: sinks must be a sequence of callables that take a QuantSample; got {sinks!r}; write "
            "e.g. [JsonlSink(path)]"
        )
    return found


def _known_stats(stats: Sequence[str] | None) -> frozenset[str]:
    for name in stats or ():
        if name not in STATS:
            raise ValueError(
                f"QuantMetrics: stats must be out of {', '.join(STATS)}; got {name!r}{did_you_mean(name, STATS)}"
            )
    return frozenset(STATS if stats is None else stats)
