"""Which recipes a layer is measured with, and the keys that their figures go by."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..config import Format, HaloConfig, Scaling
from ..operands import rounds_in_blocks, takes_input_columns
from .statistics import Names


class Form(NamedTuple):
    """How the operands of dgrad and wgrad are rounded, which the device and the shapes of a layer decide too."""

    in_blocks: bool = False
    """E has a scale for each row and block, and W of a dgrad that requantizes it one for each tile; else one a row."""
    by_columns: bool = False
    """wgrad takes the columns of X; else the rows of fprop."""

    @staticmethod
    def of(x: Tensor, column_features: int, config: HaloConfig) -> Form:
        """Of a layer that makes both products; x: its input, column_features: see :func:`takes_input_columns`."""
        return Form(rounds_in_blocks(x, config), takes_input_columns(x, column_features, config))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Of all layers that run the same config in the same forms. Compared by identity: what has one plan is reduced together."""

    own: HaloConfig | None
    """What the layers run; None in high precision."""
    configs: tuple[HaloConfig, ...]
    """Different 8-bit configs: ``own`` and those of the what-if recipes."""
    labels: Names
    """Of each config: ``""`` as run, ``"@int8"`` as a what-if recipe."""
    forms: tuple[Form, ...]
    """Of each config."""

    @staticmethod
    def of(running: HaloConfig, what_if: Mapping[str, HaloConfig]) -> Plan:
        """With a scale a row for every config. Args: running: config of the layers. what_if: recipes by label."""
        labelled: dict[HaloConfig, list[str]] = {}
        for label, config in {
            "": running,
            **{f"@{name}": config for name, config in what_if.items()},
        }.items():
            if config.format is not Format.HIGH_PRECISION:
                # A what-if recipe that the layer runs anyway is not computed twice.
                labelled.setdefault(config, []).append(label)
        own = None if running.format is Format.HIGH_PRECISION else running
        return Plan(own, tuple(labelled), tuple(map(tuple, labelled.values())), (Form(),) * len(labelled))

    def in_forms(self, forms: tuple[Form, ...]) -> Plan:
        """The same with these forms."""
        return dataclasses.replace(self, forms=forms)

    def names(self, product: str) -> Names:
        """Keys of a product for each config."""
        return tuple(tuple(product + label for label in labels) for labels in self.labels)

    @functools.cached_property
    def changed(self) -> tuple[int, ...]:
        """Indices of the configs that round X and W rotated or equalised, not as they are."""
        return tuple(i for i, config in enumerate(self.configs) if changes(config))

    @functools.cached_property
    def equalizes(self) -> bool:
        return any(config.equalize for config in self.configs)

    @functools.cached_property
    def tensorwise(self) -> bool:
        """Whether any config has one scale a tensor."""
        return any(config.scaling is Scaling.TENSORWISE for config in self.configs)


def changes(config: HaloConfig) -> bool:
    """Whether a recipe rounds something else than X and W as they are."""
    return config.rotate_k or config.equalize


def folds(config: HaloConfig) -> bool:
    """Whether the row scales of W are in E when it is rounded for dgrad."""
    return config.scaling is Scaling.ROWWISE and not config.requantize_w_dgrad
