"""QuantMetrics in the Trainer of transformers; needs the ``train`` extra."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .collect import QuantMetrics, Sink


class QuantMetricsCallback(TrainerCallback):
    """Samples while a Trainer trains: ``Trainer(..., callbacks=[QuantMetricsCallback(every=50, sinks=[WandbSink()])])``.

    Args:
        every, sinks, options: as for :class:`QuantMetrics`. Only the first process hands samples to the sinks.

    Attributes:
        metrics: the QuantMetrics, from the beginning of the training on.
    """

    def __init__(self, every: int = 50, *, sinks: Iterable[Sink] = (), **options: Any) -> None:
        self.metrics: QuantMetrics | None = None
        self._every, self._sinks, self._options = every, tuple(sinks), options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        sinks = self._sinks if state.is_world_process_zero else ()
        self.metrics = QuantMetrics(
            model, self._every, sinks=sinks, start_step=state.global_step, **self._options
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.metrics is not None
        self.metrics.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.metrics is not None
        self.metrics.close()
