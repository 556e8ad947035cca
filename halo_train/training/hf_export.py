"""Export of a trained model: a plain bfloat16 Hugging Face directory, or FP8 in the compressed-tensors layout that vLLM reads.

The FP8 scheme is what that project calls FP8_DYNAMIC: e4m3 weights with one scale for each output channel, and inputs that are
rounded when the model runs, with one scale a token; no calibration data. Weights are those of the model, unrotated and not
equalised: what rotates and equalises belongs to training. Layout: github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from halo_train import convert_to_halo_training

from .checkpoint import latest_checkpoint, load_weights
from .config import Config, load_config
from .errors import UserError
from .model import build_model, export_model, written_whole

ExportFormat = Literal["hf", "compressed-tensors"]

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_KERNEL_MULTIPLE = 16
"""Of both sizes of a weight, for the 8-bit products of vLLM."""

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one product, and refuses if only some of them are in FP8."""


def export(path: Path, form: ExportFormat, output: Path) -> str:
    """Writes the model of ``path`` to the directory ``output``, which appears whole or not at all.

    Args:
        path: Hugging Face directory; folder of a run, whose export is taken or else its last checkpoint; or one checkpoint.

    Returns:
        What was written, for the user.

    Raises:
        UserError: no model there, ``output`` exists, or a model that the format has no place for.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists and is not overwritten; choose another or remove it")
    source, made = _model_directory(path, output)
    try:
        if form == "hf":
            count = _copy(source, output, set())
            return f"{output}: {count} tensors in bfloat16, from {path}"
        layers, ignored = layers_for_fp8(source)
        _copy(source, output, layers, ignored)
        return (
            f"{output}: {len(layers)} weights in e4m3 with a scale for each output channel, the rest in bfloat16; left alone: "
            f"{', '.join(ignored) or 'no linear layer'}"
        )
    finally:
        if made:
            shutil.rmtree(source)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 data and scale of each row: weight ~= data * scale.

    Args:
        weight: [N, K].

    Returns:
        data [N, K], float8_e4m3fn; scale [N, 1], bfloat16, 1 for a row of zeros.
    """
    amax = weight.abs().amax(1, keepdim=True).float()
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones(())).to(torch.bfloat16)
    data = (weight.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX)
    return data.to(torch.float8_e4m3fn), scale


def layers_for_fp8(folder: Path) -> tuple[set[str], list[str]]:
    """Names of the linear layers that are stored in FP8, those that training converts, and of the others.

    Raises:
        UserError: experts stacked in one parameter, or no layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if stacked:
        raise UserError(
            f"--format compressed-tensors: {stacked[0]} holds the matrices of several experts, which this export has no scales "
            "for; use --format hf and quantise with llm-compressor"
        )
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        report = convert_to_halo_training(model, recipe="fp8_plain")
    except ValueError as error:
        raise UserError(f"--format compressed-tensors: {error}") from error
    fitting = {layer.name for layer in report.converted if not any(n % _KERNEL_MULTIPLE for n in layer.shape)}
    chosen = {name for name in fitting if _merged_with(name) & set(linear) <= fitting}
    return chosen, sorted(set(linear) - chosen)


def _merged_with(name: str) -> set[str]:
    """The layers that vLLM computes in one product with this one, itself among them."""
    parent, dot, own = name.rpartition(".")
    return {parent + dot + other for group in _MERGED for other in group if own in group} | {name}


def _model_directory(path: Path, output: Path) -> tuple[Path, bool]:
    """A Hugging Face directory with the model of ``path``, and whether it was made for this export."""
    for folder in (path, path / "export"):
        if (folder / "config.json").is_file():
            return folder, False
    checkpoint = path if (path / ".metadata").is_file() else latest_checkpoint(path / "checkpoints")
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)
    if checkpoint is None or run is None:
        raise UserError(
            f"{path} holds no model: no config.json, export or checkpoint; give a Hugging Face directory, the folder of a run, "
            "or one of its checkpoints"
        )
    made = output.with_name(f".{output.name}.checkpoint")
    model, tokenizer = _load_checkpoint(checkpoint, run, load_config(run / "config.yaml"))
    export_model(model, tokenizer, made)
    return made, True


def _load_checkpoint(checkpoint: Path, run: Path, config: Config) -> tuple[nn.Module, Any]:
    """The model as it was, whatever number of processes saved it."""
    path = Path(config.model.path)
    saved = run / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else saved)
    model = build_model(path, tokenizer, config.run.seed, config.data.seq_len)
    load_weights(checkpoint, model)
    return model, tokenizer


def _copy(source: Path, output: Path, layers: set[str], ignored: list[str] | None = None) -> int:
    """Writes the directory, a file of weights at a time; returns the number of tensors.

    Args:
        layers: whose weights are written in e4m3, with their scales beside them.
        ignored: the linear layers that are not; None writes no quantisation config.
    """
    index = source / _INDEX
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [_WEIGHTS]
    )
    missing = [name for name in files if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"{source / missing[0]} does not exist; the weights must be safetensors, as transformers writes them"
        )
    with written_whole(output) as temporary:
        where: dict[str, str] = {}
        size = 0
        todo = set(layers)
        for name in files:
            tensors: dict[str, Tensor] = {}
            with safe_open(source / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no mapping
                    tensor, layer = file.get_tensor(key), key.removesuffix(".weight")
                    if key != layer and layer in layers:
                        tensors[key], tensors[f"{key}_scale"] = quantize_weight(tensor)
                        todo.discard(layer)
                    else:
                        tensors[key] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            save_file(tensors, temporary / name, metadata={"format": "pt"})
            where.update(dict.fromkeys(tensors, name))
            size += sum(tensor.nbytes for tensor in tensors.values())
        if todo:
            raise UserError(
                f"--format compressed-tensors: {source} stores no weight of the name {min(todo)}.weight; its names are not those of "
                "transformers"
            )
        if index.is_file():
            record = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (temporary / _INDEX).write_text(json.dumps(record, indent=2) + "\n")
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (_INDEX, "config.json"):
                shutil.copyfile(path, temporary / path.name)
        config = json.loads((source / "config.json").read_text())
        config["dtype"] = "bfloat16"
        if ignored is not None:
            config["quantization_config"] = quantization_config(ignored)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(where)


def quantization_config(ignored: list[str]) -> dict[str, Any]:
    """Of ``config.json``: the scheme of all linear layers but the ignored ones."""
    e4m3 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**e4m3, "strategy": "channel", "dynamic": False},
                "input_activations": {**e4m3, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
