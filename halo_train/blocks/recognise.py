"""Which parts of a model's blocks run fused: the blocks of transformers that are known here, by exact class.

A class says what its forward does, so the class is what is looked at, and that nobody has replaced its forward. What a user
may have put inside (other activation, biases, adapters, a recipe of its own for a layer) is looked at piece by piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..fused import why_not_fused
from ..gemm import MULTIPLE
from ..linear import HaloLinear
from ..shared_input import JointFactors
from .modules import (
    FusedModule,
    HaloGatedMLP,
    HaloNorm,
    MLPFusion,
    NormFusion,
    Reader,
    become,
    is_watched,
    restore,
)


@dataclasses.dataclass(frozen=True)
class FusedPart:
    """A module that runs fused."""

    name: str
    what: str
    """``norm -> q_proj, k_proj, v_proj``, for example."""


@dataclasses.dataclass(frozen=True)
class UnfusedPart:
    """A module of a known block, or like one, that runs as before."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Block:
    """A decoder layer of transformers. Its children are called ``self_attn`` and ``mlp`` in all of them."""

    family: str
    """``transformers.models.<family>.modeling_<family>``."""
    prefix: str
    """Of the names of its classes."""
    readers: Mapping[str, tuple[str, ...]]
    """For each norm the layers, or the MLP, that read it and nothing else does."""
    norm: str = "RMSNorm"
    """Class without prefix; "" for nn.LayerNorm."""
    eps_name: str = "variance_epsilon"
    unit_offset: bool = False
    gated: tuple[str, ...] = ("gate_proj", "up_proj")
    """The layers of gate and up in a gated MLP, whose third is down_proj; none if it is no gated one."""
    activation: str = "act_fn"
    """Its name in the MLP."""
    attention_reader: str = "o_proj"
    """The layer of the attention that reads what scaled_dot_product_attention returns."""

    def class_path(self, kind: str) -> str:
        """Full name of its DecoderLayer, Attention, MLP or norm."""
        return f"transformers.models.{self.family}.modeling_{self.family}.{self.prefix}{kind}"


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = {"input_layernorm": _QKV, "post_attention_layernorm": ("mlp",)}
_GEMMA_2 = {"input_layernorm": _QKV, "pre_feedforward_layernorm": ("mlp",)}
_PHI_3 = {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp",)}

_BLOCKS = (
    _Block("llama", "Llama", _LLAMA),
    _Block("mistral", "Mistral", _LLAMA),
    _Block("qwen2", "Qwen2", _LLAMA),
    _Block("qwen3", "Qwen3", _LLAMA),
    _Block("gemma", "Gemma", _LLAMA, eps_name="eps", unit_offset=True),
    _Block("gemma2", "Gemma2", _GEMMA_2, eps_name="eps", unit_offset=True),
    _Block("gemma3", "Gemma3", _GEMMA_2, eps_name="eps", unit_offset=True),
    _Block("phi3", "Phi3", _PHI_3, gated=("gate_up_proj",), activation="activation_fn"),
    _Block(
        "phi",
        "Phi",
        {"input_layernorm": (*_QKV, "mlp.fc1")},
        norm="",
        eps_name="eps",
        gated=(),
        attention_reader="dense",
    ),
)
_BY_CLASS = {block.class_path("DecoderLayer"): block for block in _BLOCKS}

_KEEPING_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")
"""transformers' names of attention that is one operator."""

_GATED_LAYERS = ("gate_proj", "up_proj", "down_proj")

_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
}
"""By class; GELU of PyTorch says in an attribute which one it is."""


def fuse_blocks(model: nn.Module) -> tuple[list[FusedPart], list[UnfusedPart]]:
    """Makes the known blocks inside ``model`` run fused, in place, where their layers are HaloLinear.

    Returns:
        What runs fused; and what of known blocks, and of modules that look like theirs, does not, and why.
    """
    fused: list[FusedPart] = []
    unfused: list[UnfusedPart] = []
    seen: set[int] = set()
    for name, layer in model.named_modules():
        block = _BY_CLASS.get(_path_of(type(layer)))
        if block is None:
            continue
        for part, what, reason in _fuse_block(layer, block):
            full = ".".join(filter(None, (name, part)))
            if reason:
                unfused.append(UnfusedPart(full, reason))
            else:
                fused.append(FusedPart(full, what))
        seen.update(map(id, layer.modules()))
    for name, module in model.named_modules():
        if id(module) not in seen and _looks_gated(module):
            kind = _path_of(type(module))
            unfused.append(
                UnfusedPart(name, f"{kind} is none of the known blocks, whatever its layers are called")
            )
    return fused, unfused


def unfuse(module: nn.Module) -> None:
    """Makes every part of ``module`` that runs fused what it was, in place."""
    for part in module.modules():
        if isinstance(part, FusedModule):
            restore(part)
    for layer in module.modules():
        if isinstance(layer, HaloLinear):
            layer.joint = None
            layer.input_is_kept = False


def _fuse_block(layer: nn.Module, block: _Block) -> Iterator[tuple[str, str, str]]:
    """(part, what it does, "") or (part, "", why not) for each part of a decoder layer."""
    if "forward" in vars(layer):
        yield "", "", "its forward is overridden on the instance"
        return
    # The MLP first: its norm hands on to what it has become.
    mlp = layer.get_submodule("mlp")
    if block.gated:
        reason = _why_not_class(mlp, block.class_path("MLP")) or _why_not_gated(mlp, block)
        if not reason:
            _join([getattr(mlp, name) for name in block.gated])
            activation = _activation_of(getattr(mlp, block.activation))
            become(mlp, HaloGatedMLP, fusion=MLPFusion(block.gated, "down_proj", activation))
        yield "mlp", f"{', '.join(block.gated)} -> activation -> down_proj", reason
    _keep_once(layer.get_submodule("self_attn"), block)
    for name, readers in block.readers.items():
        what, reason = _fuse_norm(layer, block, name, readers)
        yield name, f"norm -> {what}", reason


def _keep_once(attention: nn.Module, block: _Block) -> None:
    """What fused attention returns it keeps for its own backward; the layer that reads it then need not keep it in 8 bits too."""
    reader, config = getattr(attention, block.attention_reader, None), getattr(attention, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if isinstance(reader, HaloLinear) and kind in _KEEPING_ATTENTION:
        reader.input_is_kept = not _why_not_class(attention, block.class_path("Attention"))


def _fuse_norm(layer: nn.Module, block: _Block, name: str, names: tuple[str, ...]) -> tuple[str, str]:
    """What reads a norm of a decoder layer, and why it is not fused."""
    norm, readers = layer.get_submodule(name), []
    reason = _why_not_norm(norm, block)
    for owner in dict.fromkeys(reader.split(".")[0] for reader in names):
        module = layer.get_submodule(owner)
        reader = Reader(
            module, tuple(n.removeprefix(f"{owner}.") for n in names if n.startswith(f"{owner}."))
        )
        readers.append(reader)
        if reader.layers:
            kind = {"self_attn": "Attention", "mlp": "MLP"}[owner]
            reason = reason or _why_not_class(module, block.class_path(kind))
        elif not isinstance(module, HaloGatedMLP):
            reason = reason or f"{owner}, which reads it, is not fused"
    layers = {each: getattr(reader.module, each) for reader in readers for each in reader.layers}
    reason = reason or _why_not_alike(layers)
    if not reason:
        if layers:
            _join(layers.values())
        center = isinstance(norm, nn.LayerNorm)
        become(norm, HaloNorm, fusion=NormFusion(tuple(readers), block.eps_name, center, block.unit_offset))
    return ", ".join(layers) or "mlp", reason


def _why_not_class(module: nn.Module, path: str) -> str:
    if _path_of(type(module)) != path:
        return f"{_path_of(type(module))} is not {path}"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if type(module).forward.__module__ != type(module).__module__:
        return (
            f"the forward of {type(module).__name__} was replaced by one of {type(module).forward.__module__}"
        )
    if is_watched(module):
        return "it has hooks"
    return ""


def _why_not_norm(norm: nn.Module, block: _Block) -> str:
    path = block.class_path(block.norm) if block.norm else _path_of(nn.LayerNorm)
    if reason := _why_not_class(norm, path):
        return reason
    weight: Any = norm.weight
    if weight is None:
        return "it has no weight"
    if weight.dim() != 1 or weight.shape[0] % MULTIPLE:
        return f"its width must be a multiple of {MULTIPLE}; it is {tuple(weight.shape)}"
    return ""


def _why_not_gated(mlp: nn.Module, block: _Block) -> str:
    layers = {name: getattr(mlp, name) for name in (*block.gated, "down_proj")}
    if reason := _why_not_alike(layers):
        return reason
    if any(layers[name].bias is not None for name in block.gated):
        return f"{', '.join(block.gated)}: biases of gate and up are not fused"
    if len(block.gated) == 1 and layers["down_proj"].in_features % MULTIPLE:
        return f"its width must be a multiple of {MULTIPLE} for the halves of {block.gated[0]}; it is {layers['down_proj'].in_features}"
    activation = getattr(mlp, block.activation)
    if not _activation_of(activation):
        return f"its activation {type(activation).__name__} is none of {', '.join(dict.fromkeys(_ACTIVATIONS.values()))}"
    return ""


def _why_not_alike(layers: dict[str, Any]) -> str:
    """Why layers cannot be computed together, or an empty string."""
    for name, layer in layers.items():
        if not isinstance(layer, HaloLinear):
            return f"{name} is {_path_of(type(layer))}, not HaloLinear"
        if is_watched(layer):
            return f"{name} has hooks, or a forward of its own"
        if reason := why_not_fused(layer.config):
            return f"{name}: {reason}"
    recipes = {layer.config: layer.config.name for layer in layers.values()}
    if len(recipes) > 1:
        return f"{', '.join(layers)} have different recipes: {', '.join(recipes.values())}"
    if any(layer.joint is not None for layer in layers.values()):
        return f"one of {', '.join(layers)} is part of another block too"
    return ""


def _activation_of(module: Any) -> str:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    if not isinstance(module, nn.Module) or is_watched(module):
        return ""
    return _ACTIVATIONS.get(_path_of(type(module)), "")


def _looks_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), HaloLinear) for name in _GATED_LAYERS)


def _join(layers: Any) -> None:
    joint = JointFactors()
    for layer in layers:
        layer.joint = joint


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
