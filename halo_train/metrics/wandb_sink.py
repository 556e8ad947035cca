"""Samples to Weights & Biases; needs ``pip install 'halo_train[wandb]'``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .sample import QuantSample

CHARTED_TENSORS = ("x_operand", "w_operand", "e_dgrad_operand", "e_wgrad_operand")
"""Tensors whose exponent histograms are sent."""


class WandbSink:
    """Logs every sample, on the axis ``quant/step``, in one panel section for each tensor and product.

    Section ``quant`` has worst and median layer and the table ``quant/products`` (layers x products, dB); sections such as
    ``quant_fprop`` or ``quant_x_operand`` have one panel a stat and layer. See :meth:`QuantSample.charts` for which.

    Args:
        run: of wandb.init; None is the one that is active when the first sample comes.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, run: Any = None) -> None:
        import wandb  # here, so that programs in which it is optional can import this module

        self._wandb, self._run = wandb, run
        self._row: int | None = None
        """wandb's step of the row that the last sample is in."""

    def __call__(self, sample: QuantSample) -> None:
        run = self._run or self._wandb.run
        if run is None:
            raise RuntimeError("WandbSink: no run is active; call wandb.init() before the first sampled step")
        if self._row is None:
            run.define_metric("quant/step", hidden=True)
            run.define_metric("quant*", step_metric="quant/step")
        elif self._row == run.step:
            run.log({}, commit=True)  # the loop logged nothing since; this sample would overwrite the last
        values: dict[str, Any] = {"quant/step": sample.step, **sample.charts()}
        for layer, tensors in sample.histograms.items():
            for part in CHARTED_TENSORS:
                if part in tensors:
                    shares = np.asarray(tensors[part])
                    edges = np.arange(len(shares) + 1) - len(shares) + 0.5
                    # Left to right as on a number line: the largest values last.
                    values[f"quant_{part}/exponents/{layer}"] = self._wandb.Histogram(
                        np_histogram=(shares[::-1], edges)
                    )
        columns, rows = sample.product_table()
        values["quant/products"] = self._wandb.Table(columns=columns, data=rows)
        # The row of the loop's own step stays open: had we closed it, what the loop logs for this step would be dropped.
        run.log(values, commit=False)
        self._row = run.step
