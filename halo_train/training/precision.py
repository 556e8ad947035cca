"""What a run does about its precision: reading recipes, trying them, converting, measuring, calibrating."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from halo_train import (
    Calibration,
    ConversionReport,
    HaloConfig,
    HaloLinear,
    ProductError,
    QuantMetrics,
    calibrate,
    convert_to_halo_training,
    load_recipe,
    measure_products,
)
from halo_train.calibrate import Prefer
from halo_train.config import Format
from halo_train.metrics.collect import Sink
from halo_train.metrics.records import JsonlSink

from .config import RECIPE_FILE, Config
from .data import Batch, BatchStream
from .errors import UserError
from .logging import write_atomically
from .loop import pick_device
from .loss import TokenLoss
from .model import build_loss
from .prepare import Data, load_data
from .trackers import Trackers


def read_recipes(recipe: str) -> dict[str, HaloConfig]:
    """Recipes by layer pattern of ``quant.recipe``: those of a file, or the named one for all.

    Raises:
        UserError: a file that is missing or holds no recipe.
    """
    if not recipe.endswith(RECIPE_FILE):
        return {"*": HaloConfig.from_recipe(recipe)}
    try:
        return load_recipe(recipe)
    except (OSError, ValueError) as error:
        raise UserError(f"quant.recipe: {error}") from error


def require_low_precision(recipe: HaloConfig, device: torch.device) -> None:
    """Tries the recipe on the device, so that a run that cannot compute in 8 bits ends before it starts.

    Raises:
        UserError: no kernels or no 8-bit tensor cores for this device.
    """
    layer = HaloLinear(32, 32, device=device, recipe=recipe)
    x = torch.ones(32, 32, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            layer(x).sum().backward()
    except RuntimeError as error:
        raise UserError(f"quant.recipe={recipe.name} does not run on {device}: {error}") from error


def convert(
    model: nn.Module, recipes: dict[str, HaloConfig], config: Config, folder: Path
) -> ConversionReport:
    """Converts the layers; prints which, writes ``conversion.json``.

    Raises:
        UserError: nothing can be converted, or a pattern of the recipe matches no layer.
    """
    label = config.quant.label
    try:
        report = convert_to_halo_training(
            model,
            recipe=recipes,
            output_layer=config.quant.output_layer,
            fuse=config.quant.fuse,
            recompute=config.quant.recompute,
        )
    except ValueError as error:
        raise UserError(f"quant.recipe={label} cannot be applied to {config.model.path}: {error}") from error
    path = folder / "conversion.json"
    write_atomically(path, json.dumps(report.to_dict(), indent=2) + "\n")
    by_recipe = Counter(layer.recipe for layer in report.converted)
    each = f" ({', '.join(f'{n} {name}' for name, n in by_recipe.items())})" if len(by_recipe) > 1 else ""
    print(f"{len(report.converted)} linear layers run {label}{each}; {path} names them; left alone:")
    for skip in report.skipped:
        print(f"  {skip.name}: {skip.reason}", flush=True)
    rounds = any(recipe.format is not Format.HIGH_PRECISION for recipe in recipes.values())
    unfused = report.unfused if rounds else []
    if rounds and (report.fused or unfused):
        print(
            f"{len(report.fused)} parts of blocks run fused{'; one by one:' if unfused else ''}", flush=True
        )
    for left in unfused:
        print(f"  {left.name}: {left.reason}", flush=True)
    return report


def measure(loss_of: TokenLoss, data: Data, device: torch.device) -> dict[str, dict[str, ProductError]]:
    """Errors of the three products by layer on the first validation batch."""
    batch = data.valid[0]

    def forward_and_backward() -> None:
        (loss_of(**batch.inputs(device)) / batch.trained).backward()

    errors = measure_products(loss_of.model, forward_and_backward)
    loss_of.zero_grad()
    return errors


def quant_metrics(
    config: Config, model: nn.Module, folder: Path, done: int, trackers: Trackers
) -> QuantMetrics:
    """Samples the quantisation error every ``log.quant_every`` steps.

    Args:
        done: steps before a resume.

    Raises:
        UserError: a pattern of log.quant_layers that matches no layer.
    """
    sinks: list[Sink] = [JsonlSink(folder / "quant.jsonl", done), *trackers.quant_sinks()]
    try:
        return QuantMetrics(
            model,
            config.log.quant_every,
            layers=config.log.quant_layers,
            what_if=config.log.quant_what_if,
            sinks=sinks,
            seed=config.run.seed,
            start_step=done,
        )
    except ValueError as error:
        raise UserError(f"log.quant_layers: {error}") from error


def calibrate_layers(config: Config, batches: int, prefer: Prefer) -> Calibration:
    """Chooses a recipe for each layer of the model of a run on its training data; nothing is trained.

    Args:
        batches: micro-batches that are measured; prefer: see :func:`halo_train.calibrate`.

    Raises:
        UserError: data, model or device that cannot work.
    """
    device = pick_device(config.train.device)
    data = load_data(config, config.run.dir / config.run.name)
    loss_of = build_loss(config, data.tokenizer, device).train()

    def forward_and_backward(_: nn.Module, batch: Batch) -> None:
        (loss_of(**batch.inputs(device)) / batch.trained).backward()

    try:
        with BatchStream(data.train, config.train.micro_batch, data.pad_id, config.run.seed) as stream:
            first = (next(stream) for _ in range(batches))
            return calibrate(loss_of.model, first, forward_and_backward, prefer=prefer)
    except ValueError as error:
        raise UserError(f"{config.model.path}: {error}") from error
