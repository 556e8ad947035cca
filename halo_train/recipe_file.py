"""Recipes by layer: mappings of name patterns to recipes, and the JSON file that holds one."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import RECIPES, HaloConfig, resolve_recipe

LayerRecipes = Mapping[str, str | HaloConfig]
"""``{"model.layers.0.*": "bf16", "*.down_proj": "int8", "*": "fp8"}``: the first pattern that matches a layer decides."""


def recipe_of_layer(recipes: LayerRecipes, name: str) -> HaloConfig | None:
    """Of the first pattern (``fnmatch``) that matches the name; None when none does."""
    for pattern, recipe in recipes.items():
        if fnmatch.fnmatchcase(name, pattern):
            return resolve_recipe(recipe)
    return None


def check_patterns(recipes: LayerRecipes, names: Iterable[str]) -> None:
    """Every pattern has to match a layer, so that a misspelt one does not leave layers without their recipe.

    Raises:
        ValueError: a pattern without a layer, or an unknown recipe.
    """
    known = list(names)
    for pattern, recipe in recipes.items():
        resolve_recipe(recipe)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"recipe: the pattern {pattern!r} matches none of the {len(known)} layers that can be converted, e.g. "
                f"{', '.join(map(repr, known[:3]))}"
            )


def save_recipe(path: str | Path, recipes: LayerRecipes, evidence: Mapping[str, Any]) -> None:
    """Writes a recipe file: ``{"recipe": {pattern: recipe name or fields}, "evidence": {...}}``.

    Args:
        evidence: anything that JSON holds; kept for the reader and not read back.
    """
    layers = {pattern: _to_json(resolve_recipe(recipe)) for pattern, recipe in recipes.items()}
    text = json.dumps({"recipe": layers, "evidence": evidence}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_recipe(path: str | Path) -> dict[str, HaloConfig]:
    """The mapping of a recipe file.

    Raises:
        ValueError: no recipe file, an unknown recipe or field.
        OSError: not readable.
    """
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["recipe"]
        return {pattern: _from_json(value) for pattern, value in layers.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} must be a JSON object with "recipe": {{"layer pattern": "recipe name" or fields of HaloConfig}}, as '
            f"written by halo-train calibrate; {type(error).__name__}: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _to_json(config: HaloConfig) -> str | dict[str, Any]:
    if config.name in RECIPES:
        return config.name
    fields = dataclasses.asdict(config)
    return {key: getattr(value, "value", value) for key, value in fields.items()}


def _from_json(value: str | dict[str, Any]) -> HaloConfig:
    return HaloConfig.from_recipe(value) if isinstance(value, str) else HaloConfig(**value)
