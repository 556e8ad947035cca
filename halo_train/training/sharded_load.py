"""A Hugging Face directory into the shards of FSDP2: each process reads its own rows, none ever holds the whole model.

The parameters are on the meta device until :func:`fill_shards`. That is done where reading is all there is to loading: tensors
under the model's own names, in its own shapes. Where transformers does more (:class:`WholeModelNeeded`) it has to load.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from halo_train import HaloLinear


class WholeModelNeeded(Exception):
    """Why the tensors of a directory are not those of the model as they are."""


def empty_model(path: Path, dtype: torch.dtype) -> Any:
    """The model of a directory as ``from_pretrained`` returns it, but parameters on the meta device, buffers on the CPU.

    Args:
        dtype: of the parameters.

    Raises:
        WholeModelNeeded: :func:`fill_shards` could not give it the weights that ``from_pretrained`` does.
        OSError, ValueError: no causal language model of transformers.
    """
    config = AutoConfig.from_pretrained(path)
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise WholeModelNeeded("it holds an adapter of another model")
    if getattr(config, "quantization_config", None) is not None:
        raise WholeModelNeeded("its weights are quantised")
    # The buffers are computed: a checkpoint does not hold e.g. rotary frequencies.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which init_empty_weights undoes
    if (path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    in_float32 = model._keep_in_fp32_modules_strict
    if in_float32 and dtype != torch.float32:
        raise WholeModelNeeded(f"transformers keeps {', '.join(sorted(in_float32))} in float32")
    if any(isinstance(transform, WeightConverter) for transform in get_model_conversion_mapping(model)):
        raise WholeModelNeeded("transformers rearranges its weights when it loads them")
    files = _files(path)
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    for alike in names.values():
        stored = [name for name in alike if name in files]
        if not stored:
            raise WholeModelNeeded(f"its files have no {alike[0]}")
        if len(stored) > 1:  # which may differ, and then are not tied
            raise WholeModelNeeded(f"its files have both {' and '.join(stored)}, one weight in the model")
    for name, entry in _entries(files, state.keys() & files.keys()):
        if entry.get_shape() != list(state[name].shape):
            raise WholeModelNeeded(
                f"{name} is {entry.get_shape()} in its files and {list(state[name].shape)} in the model"
            )
    return model.eval()


@torch.no_grad()
def fill_shards(model: nn.Module, path: Path, device: torch.device) -> None:
    """Gives the parameters of :func:`empty_model` their values, after conversion and ``fully_shard``.

    A process reads the rows of its shards, one tensor after the other. Tied parameters stay tied.

    Args:
        model: sharded along rows, on a mesh of one dimension.
        device: of the shards.
    """
    files = _files(path)
    # Their names in the files: of those of a tied parameter there is one. Holds the parameters, whose id is the key below.
    stored = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in files}
    filled: dict[int, nn.Parameter] = {}
    for name, entry in _entries(files, stored):
        old = stored[name]
        if isinstance(old, DTensor):
            filled[id(old)] = nn.Parameter(_shard(entry, old, device), old.requires_grad)
        else:
            old.copy_(entry[...])
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, filled[id(parameter)])
        if isinstance(module, HaloLinear):  # its buffer was made where its weight was
            module.equalizer_exponent = torch.zeros_like(module.equalizer_exponent, device=device)


@contextmanager
def weights_while_used(model: nn.Module, path: Path) -> Iterator[None]:
    """While active, a module of :func:`empty_model` has its weights, on the CPU, during its forward. Other models are left alone.

    For a look at what the model computes before it is converted.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield
        return
    files = _files(path)
    stored = {id(value): name for name, value in model.state_dict(keep_vars=True).items() if name in files}
    empty = {module: dict(module._parameters) for module in model.modules() if module._parameters}

    def load(module: nn.Module, _: object) -> None:
        for name, parameter in empty[module].items():
            if parameter is not None:
                with safe_open(files[stored[id(parameter)]], framework="pt") as file:
                    value = file.get_tensor(stored[id(parameter)])
                module._parameters[name] = nn.Parameter(value.to(parameter.dtype))

    def drop(module: nn.Module, *_: object) -> None:
        module._parameters.update(empty[module])

    handles = [module.register_forward_pre_hook(load) for module in empty]
    handles += [module.register_forward_hook(drop, always_call=True) for module in empty]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shard(entry: Any, parameter: DTensor, device: torch.device) -> DTensor:
    """The rows of a tensor in a file that this process has of ``parameter``."""
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    start = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)  # as torch.chunk
    stored = entry[start : start + parameter._local_tensor.shape[0]]
    return DTensor.from_local(
        stored.to(device, parameter.dtype, copy=True),  # which else may be the mapped file itself
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor of a directory."""
    index, single = path / SAFE_WEIGHTS_INDEX_NAME, path / SAFE_WEIGHTS_NAME
    if single.is_file():  # from_pretrained's order
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise WholeModelNeeded(f"it has neither {single.name} nor {index.name}")
    return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}


def _entries(files: dict[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, slice of safetensors) file by file: nothing is read before it is indexed."""
    for path, group in groupby(sorted(names, key=lambda name: str(files[name])), key=files.__getitem__):
        with safe_open(path, framework="pt") as file:
            for name in group:
                yield name, file.get_slice(name)
