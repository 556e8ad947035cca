"""FSDP2 with 8-bit weights on the wire: what ``fully_shard`` calls around its all-gather of a HaloLinear weight.

FSDP2 shards rows, and rows are rotated and rounded one by one. So each rank rotates and rounds only its shard, the wire
carries one byte a weight and four bytes a row, and what arrives is bitwise the weight that one GPU would have rounded::

    HaloLinear.weight   Parameter [N, K]                          after convert_to_halo_training
                        DTensor of ShardedWeight [N / ranks, K]   after fully_shard; between uses, and for the optimiser
                        GatheredWeight [N, K]                     while FSDP2 has it gathered; what the gradient belongs to

``HaloLinear`` turns its shard into a ShardedWeight when FSDP2 sets it (:func:`attach`); nothing is to be switched on. A weight
that other modules share, and recipes with one scale for the whole tensor, are gathered in the dtype that FSDP2 would use
and rounded by the layer: the shards of a tensor do not know its amax.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes

from . import agreement
from .agreement import check_agreement
from .config import Format, Scaling, storage_dtype
from .gemm import MULTIPLE
from .operands import quantize_weight
from .quantize import Quantized, column_amax, exponents_of_amax


class Layer(agreement.Layer, Protocol):
    """What is used of a HaloLinear."""

    ranks_agree: bool
    tied: bool
    equalizer_exponent: Tensor
    equalizer_taken: bool

    @property
    def weight(self) -> Tensor: ...

    def equalizer(self) -> Tensor | None: ...


def is_sharded(weight: Any) -> bool:
    """A DTensor; named by its attribute, because importing torch.distributed.tensor takes half a second."""
    return hasattr(weight, "_local_tensor")


def check_whole(fqn: str, weight: Tensor) -> None:
    """A ValueError that names the layer where this rank holds a part of its weight."""
    if is_sharded(weight):
        raise ValueError(
            f"HaloLinear {fqn!r}: the weight is a DTensor, of which this rank holds a part. With FSDP2 call the module that fully_shard "
            "was called on, not a layer inside it; tensor parallelism is not supported: leave the layer out of the plan or "
            "out of the conversion with module_filter_fn"
        )
    if _is_flattened_by_fsdp1(weight):
        raise ValueError(
            f"HaloLinear {fqn!r}: FullyShardedDataParallel (FSDP1) is not supported: it cuts rows apart, and a rotation needs whole ones; "
            "use torch.distributed.fsdp.fully_shard (FSDP2) on each block and then on the model"
        )


def _is_flattened_by_fsdp1(weight: Tensor) -> bool:
    """In its forward the weight is a view of the flat parameter; FSDP1 marks that, and the parameters that went into it."""
    return any(getattr(t, "_fsdp_flattened", False) for t in (weight, weight._base))


class ShardedWeight(Tensor):
    """The rows of a weight that this rank keeps: an ordinary tensor that also knows its layer. Operators return plain tensors.

    FSDP2 moves and pads shards in Python and wants its hooks on what comes out; those few functions keep the class.
    """

    layer: Layer

    @classmethod
    def wrap(cls, shard: Tensor, layer: Layer) -> ShardedWeight:
        """The same memory, of this class."""
        new = shard.as_subclass(cls)
        new.layer = layer
        return new

    def plain(self) -> Tensor:
        """The same memory, an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func in _KEEPING_THE_CLASS and isinstance(args[0], ShardedWeight) and type(out) is Tensor:
            return cls.wrap(out, args[0].layer)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def rounded_bytes(self, ranks: int) -> tuple[tuple[Tensor, ...], torch.dtype]:
        """Rotates and rounds the shard: data [rows, K'] and scales [rows, 4] as bytes, rows being those of the longest shard.
        Float64 weights have scales of 8 bytes; hence their dtype.
        """
        data, scale = self._quantize(ranks)
        data = data.view(torch.uint8)
        if ranks == 1:  # FSDP2 then copies one tensor and gathers none
            return (torch.cat([data.view(-1), scale.view(torch.uint8)]),), scale.dtype
        return (data, scale.view(-1, 1).view(torch.uint8)), scale.dtype

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        scale_dtype: torch.dtype,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[GatheredWeight, tuple[Tensor, ...]] | None:
        """The gathered bytes as the layer's weight; they stay where FSDP2 put them, which frees and refills them itself."""
        if out is not None:
            return None
        columns = self.layer.in_features + -self.layer.in_features % MULTIPLE
        if len(all_gather_outputs) == 1:
            packed = all_gather_outputs[0]
            rows = packed.numel() // (columns + scale_dtype.itemsize)
            data, scale = packed[: rows * columns], packed[rows * columns :]
        else:
            data, scale = (output.view(-1) for output in all_gather_outputs)
        shape = (self.layer.out_features, self.layer.in_features)
        dtype = storage_dtype(self.layer.config.format, torch.float32)
        gathered = GatheredWeight(
            data.view(dtype).view(-1, columns), scale.view(scale_dtype), shape, param_dtype
        )
        return gathered, ()

    def _quantize(self, ranks: int) -> Quantized:
        rows = -(-self.layer.out_features // ranks)
        shard = self.plain()
        # All ranks send the same size; a row of zeros rounds to zeros with scale 1, as padding does on one GPU.
        if shard.shape[0] < rows:  # F.pad copies even where nothing is missing
            shard = F.pad(shard, (0, 0, 0, rows - shard.shape[0]))
        quantized = quantize_weight(shard, self.layer.equalizer(), self.layer.config)
        if quantized.data.shape[0] == rows:
            return quantized
        return Quantized(quantized.data[:rows], quantized.scale[:rows])


def _of_known_signature(hook: Callable[..., Any]) -> Callable[..., Any]:
    """FSDP2 asks for the signature before each call, and to find it out takes as long as half of the call."""
    hook.__signature__ = inspect.signature(hook)  # type: ignore[attr-defined]
    return hook


class EvenShard(ShardedWeight):
    """Of a weight that every rank has as many rows of."""

    @_of_known_signature
    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], torch.dtype]:
        return self.rounded_bytes(mesh.size())


class UnevenShard(ShardedWeight):
    """Of any other. FSDP2's hook with five arguments accepts here only inputs of the shape of the weight, which scales of rows never
    have; it does not look at those of the older one, with the mesh alone."""

    @_of_known_signature
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], torch.dtype]:
        return self.rounded_bytes(mesh.size())


_KEEPING_THE_CLASS = {Tensor.to, Tensor.cpu, Tensor.pin_memory, Tensor.new_zeros, Tensor.narrow}


class GatheredWeight(Tensor):
    """A weight [N, K] of which only the rounded form exists: data [rows, K'] in 8 bits and one scale a row, rows >= N.

    Its dtype is that of the gradient. Only HaloLinear can use it; other operators raise.
    """

    rounded: Tensor
    row_scale: Tensor

    @staticmethod
    def __new__(
        cls, rounded: Tensor, row_scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> GatheredWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rounded.device)

    def __init__(
        self, rounded: Tensor, row_scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.rounded, self.row_scale = rounded, row_scale

    def quantized(self) -> Quantized:
        """As :func:`halo_train.operands.quantize_weight` returns it, but padded to a multiple of 16 rows only if what was gathered is: the
        products pad it each time, because a padded copy would be kept for backward beside what FSDP2 keeps."""
        rows = self.shape[0] + -self.shape[0] % MULTIPLE
        if self.rounded.shape[0] < rows:
            rows = self.shape[0]
        return Quantized(self.rounded[:rows], self.row_scale[:rows])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[tuple[int, ...], torch.dtype]]:
        return ["rounded", "row_scale"], (tuple(self.shape), self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], context: tuple[tuple[int, ...], torch.dtype], shape: Any, stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(tensors["rounded"], tensors["row_scale"], *context)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"GatheredWeight({list(self.shape)}, {self.rounded.dtype}, one scale a row)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten, weight = torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.alias.default, aten.as_strided.default):
            return GatheredWeight(weight.rounded, weight.row_scale, tuple(weight.shape), weight.dtype)
        if func is aten.zeros_like.default:  # FSDP2's gradient of a weight that was not used
            return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        raise RuntimeError(
            f"{func}: the weight of a HaloLinear is gathered by FSDP2 in 8 bits, and only the layer itself can use it; read it "
            "outside forward and backward from the sharded parameter (weight.full_tensor()), or leave the layer out with "
            "convert_to_halo_training(module_filter_fn=...)"
        )


def attach(layer: Layer, weight: Any) -> None:
    """Makes the shard of ``weight``, the DTensor that FSDP2 sets on ``layer``, one that is gathered in 8 bits.

    Raises:
        ValueError: what is sharded are not the rows of the weight, FSDP2 cannot serve hooks as it was called, or the ranks did not
            convert alike.
    """
    shard, placements, mesh = weight._local_tensor, weight.placements, weight.device_mesh
    if isinstance(shard, ShardedWeight):
        if shard.layer is not layer:  # shared: each layer has its own equalizer
            weight._local_tensor = shard.plain()
        return
    if layer.tied or layer.config.format not in _WIRE_FORMATS or layer.config.scaling is not Scaling.ROWWISE:
        return
    if all(placement.is_replicate() for placement in placements):
        return
    replicated = all(placement.is_replicate() for placement in placements[:-1])
    if mesh.ndim > 2 or not replicated or not placements[-1].is_shard(0):
        raise ValueError(
            f"fully_shard: the weight of HaloLinear {layer.fqn!r} must be sharded along its rows, on a mesh of one dimension or on "
            f"one of two that replicates along the first (HSDP); got placements {tuple(placements)}; drop shard_placement_fn "
            "and tensor parallelism for this layer, or leave it out with convert_to_halo_training(module_filter_fn=...)"
        )
    if _reshards_to_fewer():
        raise ValueError(
            f"fully_shard: reshard_after_forward must be True or False where the weight of HaloLinear {layer.fqn!r} is gathered in 8 bits, "
            "because FSDP2 keeps what hooks have gathered on all ranks or on none; got a number of ranks; use True or False, or a mesh "
            "of two dimensions (HSDP), which gathers over so many"
        )
    if not layer.ranks_agree:
        layer.to_meet = check_agreement(layer, weight)
        layer.ranks_agree = True
    kind = UnevenShard if weight.shape[0] % mesh.size(mesh.ndim - 1) else EvenShard
    weight._local_tensor = kind.wrap(shard, layer)


_WIRE_FORMATS = (Format.E4M3, Format.E5M2, Format.INT8)


@_disable_dynamo  # torch.compiler.disable would import the compiler with this file
def take_agreed_exponents(layers: Sequence[Layer], shards: Sequence[Any], x: Tensor) -> None:
    """Gives sharded layers that read x one log2 d, from the batches of all ranks. Every rank must call it.

    One all-reduce of 2 K floats over each dimension of the mesh. See :func:`halo_train.quantize.equalizer_exponents`.

    Args:
        shards: the parameters of the layers, DTensors of one mesh.
        x: [M, K], the tokens of this rank; M may be 0.
    """
    # Selective activation checkpointing is a mode that would keep what is rounded here for the recompute, which does not.
    with _disable_current_modes():
        amax = torch.stack([column_amax(x), shards_amax(shards, x.device)])
        exponent = exponents_of_amax(*agreed_amax(amax, shards[0].device_mesh))
        for layer, shard in zip(layers, shards, strict=True):
            layer.equalizer_exponent.copy_(exponent)
            layer.equalizer_taken = True
            regather(layer, shard)


def shards_amax(shards: Sequence[Any], device: torch.device) -> Tensor:
    """column_amax over what this rank holds of weights [N_i, K], DTensors."""
    return torch.stack([column_amax(shard._local_tensor.to(device)) for shard in shards]).amax(0)


def agreed_amax(amax: Tensor, ranks: Any) -> Tensor:
    """The maximum over all ranks of a mesh or process group, inf where one of them is not finite. Every rank must call it."""
    # Not finite on one rank must be the same on all; how a maximum treats nan depends on the backend.
    amax = torch.nan_to_num(amax, nan=torch.inf, posinf=torch.inf)
    for group in [ranks] if isinstance(ranks, dist.ProcessGroup) else ranks.get_all_groups():
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    return amax


def regather(layer: Layer, shard: Any) -> None:
    """Where the weight of the layer is gathered: gathers it again, in place, after the factors have changed. Every rank must call it.

    Args:
        shard: the parameter, a DTensor.
    """
    gathered = layer.weight
    if not isinstance(gathered, GatheredWeight):
        return
    mesh = shard.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    ranks = dist.get_world_size(group)
    quantized = shard._local_tensor.to(gathered.device)._quantize(ranks)
    for whole, part in zip((gathered.rounded, gathered.row_scale), quantized, strict=True):
        out, part = whole.view(torch.uint8).view(-1), part.contiguous().view(torch.uint8).view(-1)
        dist.all_gather(list(out.chunk(ranks)), part, group=group)
    if gathered.is_cuda:
        # Once a layer: its equalizer was written on this stream, FSDP2 will read it on another.
        torch.cuda.current_stream(gathered.device).synchronize()


def _reshards_to_fewer() -> bool:
    """Whether ``fully_shard``, which is calling, was given ``reshard_after_forward=<int>``.

    It tells no hook and fails after the first forward, with an assertion of its own; but what sets the parameter knows.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        owner: Any = frame.f_locals.get("self")
        if type(owner).__name__ == "FSDPParam":
            return owner.post_forward_mesh_info not in (None, owner.mesh_info)
    return False
