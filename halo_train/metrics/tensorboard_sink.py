"""Samples to TensorBoard; needs ``pip install 'halo_train[tensorboard]'``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .sample import QuantSample

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes scalars and exponent histograms of every sample; keys as in :class:`WandbSink`.

    Args:
        folder: for the event file; or a SummaryWriter that exists.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path | SummaryWriter) -> None:
        # Here, so that programs in which it is optional can import this module.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = folder if isinstance(folder, SummaryWriter) else SummaryWriter(str(folder))

    def __call__(self, sample: QuantSample) -> None:
        for key, value in sample.charts().items():
            self._writer.add_scalar(key, value, sample.step)
        for layer, tensors in sample.histograms.items():
            for part, shares in tensors.items():
                counts = np.asarray(shares)[::-1]
                orders = np.arange(len(counts)) - len(counts) + 1.0
                self._writer.add_histogram_raw(
                    f"quant_{part}/exponents/{layer}",
                    min=orders[0],
                    max=orders[-1],
                    num=counts.sum(),
                    sum=(counts * orders).sum(),
                    sum_squares=(counts * orders**2).sum(),
                    bucket_limits=(orders + 0.5).tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=sample.step,
                )
        self._writer.flush()
