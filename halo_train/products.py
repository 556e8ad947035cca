"""The steps of a layer's forward and backward that autograd Functions are made of: docs/numerics.md, eq. 4 to 6."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .config import HaloConfig, Scaling, storage_dtype
from .gemm import MULTIPLE, matmul, matmul_rows, scale_of_columns
from .operands import (
    contract_rows,
    levels_of,
    pad_matrix,
    pad_rows,
    pad_vector,
    quantize_input,
    quantize_input_columns,
    quantize_weight,
    rotation_block,
    round_grad,
    rounds_in_blocks,
)
from .quantize import Quantized


class ForWgrad(NamedTuple):
    """What wgrad takes of X [M, K]; all None where there is no wgrad."""

    data: Tensor | None = None
    """Its rows (X D^-1) H rounded [M', K'], or by columns (diag(1/s) X)^T [K', M']; or X itself, from which backward makes either."""
    scale: Tensor | None = None
    """s [M'], what the rows of E are multiplied by."""
    tiles: Tensor | None = None
    """Scales of the columns."""
    d: Tensor | None = None
    """That of the rows."""

    @property
    def quantized(self) -> Quantized:
        """Data and its own scales."""
        assert self.data is not None
        scale = self.scale if self.tiles is None else self.tiles
        assert scale is not None
        return Quantized(self.data, scale)


class ForDgrad(NamedTuple):
    """What dgrad takes of W [N, K]; all None where there is no dgrad."""

    weight: Tensor | None = None
    """W itself, which takes no memory; else what is rounded of it:"""
    data: Tensor | None = None
    """Its columns [K', N'], or where dgrad is folded its rows [N', K'], or [N, K'] as FSDP2 has gathered them."""
    scale: Tensor | None = None
    """Of data."""
    levels: Tensor | None = None
    """:func:`halo_train.operands.levels_of` its rows."""

    def fold(self, config: HaloConfig, columns: int) -> Tensor | None:
        """What the columns of E, of which there are so many, are multiplied by before E is rounded for dgrad, or None.

        Raises:
            RuntimeError: FSDP2 has taken its memory away; reading it would be a segmentation fault.
        """
        fold = self.levels if config.requantize_w_dgrad else self.scale
        if fold is None or fold.dim() == 0:
            return fold
        if not torch.compiler.is_compiling() and _is_freed(fold):
            raise RuntimeError(
                "HaloLinear: FSDP2 has freed the gathered weight and not gathered it again for backward, which multiplies by it; leave "
                "set_unshard_in_backward(True), and call backward on what the module that fully_shard was called on has returned"
            )
        return pad_vector(fold, columns)

    def divisors(self) -> Tensor | None:
        """1/l, what the rows of W are multiplied by before its columns are rounded, if it has levels."""
        return None if self.levels is None else self.levels.reciprocal()  # 1 / x would be two kernels


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.autograd.function.once_differentiable``, which costs the host 4 us, where a gradient is differentiated: elsewhere it
    does nothing."""
    differentiated = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return differentiated(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)
"""Asked once: torch.compile cannot trace the question before torch 2.12."""


def fprop(
    x: Quantized,
    weight: Tensor,
    d: Tensor | None,
    rows: Quantized | None,
    dtype: torch.dtype,
    config: HaloConfig,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """X W^T [M', N'], padded, and of the rounded rows of W [N, K] the data, where dgrad needs it, and the scales.

    Args:
        rows: those of a RoundedWeight, padded or not, or None: W is rounded here.
    """
    if rows is None and _rounds_on_the_way(config):
        padded = pad_matrix(weight, MULTIPLE, MULTIPLE)
        k = padded.shape[1]
        factors = None if d is None else pad_vector(d, k)
        block = rotation_block(k, config)
        y, scale = ops.matmul_weight_rows(x.data, x.scale, padded, block, factors, dtype, config.fast_accum)
        return y, None, scale
    if rows is None:
        rows = quantize_weight(weight, d, config)
    # What pads them is not what is kept.
    return matmul(x, pad_rows(rows), dtype, config.fast_accum), *rows


def round_and_multiply(
    x: Tensor,
    inverse: Tensor | None,
    weight: Tensor,
    d: Tensor | None,
    block: int,
    by_columns: bool,
    dtype: torch.dtype,
    config: HaloConfig,
) -> tuple[ForWgrad, Tensor, Tensor | None, Tensor]:
    """What wgrad takes of X [M, K], by rows or by columns, and :func:`fprop` of a W that is rounded here; block: rotation_block(K)."""
    if not in_one_call(config):
        rounded = quantize_input(x, inverse, config)
        kept = for_wgrad(x, rounded, d, by_columns, config)
        return kept, *fprop(rounded, weight, d, None, dtype, config)
    tokens, padded = pad_matrix(x, MULTIPLE, MULTIPLE), pad_matrix(weight, MULTIPLE, MULTIPLE)
    k = padded.shape[1]
    factors = None
    if inverse is not None and d is not None:
        inverse, factors = pad_vector(inverse, k), pad_vector(d, k)
    stored = storage_dtype(config.format, x.dtype)
    y, data, scale, tiles, weight_scale = ops.matmul_rounded(
        tokens, inverse, padded, factors, stored, block, dtype, config.fast_accum, by_columns
    )
    kept = ForWgrad(data, scale, tiles) if by_columns else ForWgrad(data, scale, None, d)
    return kept, y, None, weight_scale


def for_wgrad(
    x: Tensor, rounded: Quantized, d: Tensor | None, by_columns: bool, config: HaloConfig
) -> ForWgrad:
    """What to save of X [M, K] for wgrad; rounded: its rows."""
    if not by_columns:
        return ForWgrad(*rounded, None, d)
    data, tiles = quantize_input_columns(x, rounded.scale, config)
    return ForWgrad(data, rounded.scale, tiles)


def for_dgrad(
    weight: Tensor, data: Tensor | None, scale: Tensor, columns: Quantized | None, config: HaloConfig
) -> ForDgrad:
    """What to save of W [N, K] for dgrad; data, scale: as :func:`fprop` returns them, columns: those of a RoundedWeight."""
    if not config.requantize_w_dgrad:
        return ForDgrad(None, data, scale)
    levels = levels_of(scale, config)
    return ForDgrad(weight, levels=levels) if columns is None else ForDgrad(None, *columns, levels)


def round_gradient(
    e: Tensor,
    w: ForDgrad,
    x_scale: Tensor | None,
    needs_dx: bool,
    needs_dw: bool,
    bias_dtype: torch.dtype | None,
    config: HaloConfig,
    by_columns: bool = False,
) -> tuple[Quantized | None, Quantized | None, Tensor | None]:
    """E [M, N] rounded for dgrad and for wgrad, each only if it is needed.

    Args:
        bias_dtype: dtype of the bias gradient [N], or None for no third result.
        by_columns: wgrad takes the columns of X.
    """
    padded = pad_matrix(e, MULTIPLE, MULTIPLE)
    fold = w.fold(config, padded.shape[1])
    needs_db = bias_dtype is not None
    in_tiles = by_columns or (config.requantize_w_dgrad and w.scale is not None and w.scale.dim() == 2)
    for_dx, for_dw, sums = round_grad(padded, fold, x_scale, needs_dx, needs_dw, needs_db, config, in_tiles)
    if bias_dtype is None:
        return for_dx, for_dw, None
    if sums is None:
        sums = e.sum(0, dtype=torch.promote_types(e.dtype, torch.float32))
    return for_dx, for_dw, sums[: e.shape[1]].to(bias_dtype)


def gradients(
    e: Tensor,
    w: ForDgrad,
    x: ForWgrad,
    block: int,
    bias_dtype: torch.dtype | None,
    dtype: torch.dtype,
    config: HaloConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`round_gradient`, :func:`dgrad` [M', K'] in ``dtype`` and :func:`wgrad` [N', K'], padded, where :func:`in_one_call` and W
    itself is given."""
    assert w.weight is not None
    assert x.scale is not None
    padded, weight = pad_matrix(e, MULTIPLE, MULTIPLE), pad_matrix(w.weight, MULTIPLE, MULTIPLE)
    dx, dw, sums = ops.matmul_gradients(
        padded,
        w.fold(config, padded.shape[1]),
        weight,
        w.divisors(),
        x.quantized.data,
        x.scale,
        scale_of_columns(x.quantized) if x.tiles is None else x.tiles,
        storage_dtype(config.grad_format, e.dtype),
        block if x.tiles is None else 1,
        None if x.d is None else pad_vector(x.d, weight.shape[1]),
        dtype,
        bias_dtype is not None,
        config.fast_accum,
        rounds_in_blocks(e, config),
    )
    return dx, dw, None if bias_dtype is None else sums[: e.shape[1]].to(bias_dtype)


def _rounds_on_the_way(config: HaloConfig) -> bool:
    """Whether there are operators that round W and multiply by it."""
    return config.scaling is Scaling.ROWWISE and config.requantize_w_dgrad


def in_one_call(config: HaloConfig) -> bool:
    """Whether several steps run as one operator, which costs the host less. Not where somebody looks at operators one by one: a
    compiler, which does once what several layers do, or a dispatch mode, such as that of selective checkpointing, which keeps the
    results of some."""
    return _rounds_on_the_way(config) and not _are_operators_seen()


def _are_operators_seen() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _is_freed(t: Tensor) -> bool:
    return t.numel() > 0 and t.untyped_storage().size() == 0


def dgrad(e: Quantized, w: ForDgrad, dtype: torch.dtype, config: HaloConfig) -> Tensor:
    """E W [M', K'], padded; rotated and equalised as W is where dgrad is folded (:func:`undo_fold`)."""
    if w.weight is not None:
        padded = pad_matrix(w.weight, MULTIPLE, MULTIPLE)
        divisors = w.divisors()
        stored = storage_dtype(config.format, w.weight.dtype)
        return ops.matmul_weight_columns(e.data, e.scale, padded, divisors, stored, dtype, config.fast_accum)
    assert w.data is not None
    assert w.scale is not None
    product = matmul if config.requantize_w_dgrad else matmul_rows
    return product(e, pad_rows_again(Quantized(w.data, w.scale), e.data), dtype, config.fast_accum)


def undo_fold(dx: Tensor, block: int, inverse: Tensor | None, config: HaloConfig) -> Tensor:
    """dX of a folded dgrad, or a sum of them, rotated and equalised back, in place."""
    return dx if config.requantize_w_dgrad else _undo_k(dx, block, inverse)


def wgrad(
    e: Quantized,
    x: Quantized,
    block: int,
    d: Tensor | None,
    weight: tuple[torch.Size, torch.dtype],
    config: HaloConfig,
    *,
    rows: bool = False,
) -> Tensor:
    """E^T X H^T D [N, K].

    Args:
        x: as :func:`halo_train.operands.contract_rows` returns it, for several products with it, or its columns; or with ``rows`` as it
            was rounded.
        weight: shape and dtype.
    """
    shape, dtype = weight
    if x.scale.dim() == 2:
        return crop(matmul(e, x, dtype, config.fast_accum), *shape)
    if rows and _are_operators_seen():
        x, rows = contract_rows(x), False
    if block == 1 and d is None:
        return crop((matmul_rows if rows else matmul)(e, x, dtype, config.fast_accum), *shape)
    scale = scale_of_columns(x) if rows else x.scale
    factors = None if d is None else pad_vector(d, x.data.shape[1 if rows else 0])
    dw = ops.matmul_rotated(e.data, x.data, e.scale, scale, rows, block, factors, dtype, config.fast_accum)
    return crop(dw, *shape)


def undo_wgrad(total: Tensor, block: int, d: Tensor | None, factor: Tensor) -> Tensor:
    """factor * total H^T D, padded: dW of a sum of E^T X, rotated and equalised as x is; factor: one number, on its device."""
    k = total.shape[1]
    if block == 1 and d is None:
        return total * factor
    factors = factor.expand(k).contiguous() if d is None else pad_vector(d, k) * factor
    return ops.hadamard(total, block, 1.0 / math.sqrt(block), None, factors)


def _undo_k(grad: Tensor, block: int, col_scale: Tensor | None) -> Tensor:
    """grad H^T diag(col_scale) for a product [rows, K'] that nothing else uses: in place, rounded once."""
    if block > 1 or col_scale is not None:
        factors = None if col_scale is None else pad_vector(col_scale, grad.shape[1])
        ops.hadamard_(grad, block, 1.0 / math.sqrt(block), None, factors)
    return grad


def again(factors: Tensor | None, k: int, e: Tensor) -> Tensor | None:
    """factors [k] for what forward has computed before and backward computes again.

    Under torch.compile a copy that depends on E: else the compiler would find the first result and keep it.
    """
    if factors is None and torch.compiler.is_compiling():
        factors = e.new_ones(k, dtype=torch.float32)
    return None if factors is None else after(factors, e)


def after(x: Tensor, e: Tensor) -> Tensor:
    """x; under torch.compile a copy that depends on E, see :func:`again`."""
    return ops.copy_after(x, e) if torch.compiler.is_compiling() else x


def pad_rows_again(q: Quantized, e: Tensor) -> Quantized:
    """:func:`halo_train.operands.pad_rows` of what forward has padded before; see :func:`again`."""
    return pad_rows(Quantized(after(q.data, e), q.scale)) if q.data.shape[0] % MULTIPLE else q


def as_matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def crop(x: Tensor, rows: int, columns: int) -> Tensor:
    return x if x.shape == (rows, columns) else x[:rows, :columns]


def as_output(y: Tensor, leading: torch.Size, columns: int) -> Tensor:
    """A padded product [M', N'] as what a layer returns, [*leading, N].

    The same memory and yet no view: autograd forbids to write in place, as ``y += 1`` and ``nn.ReLU(inplace=True)`` do, to a view that
    a Function returns.
    """
    for axis, size in enumerate((leading.numel(), columns)):
        if y.shape[axis] != size:
            y = torch.unsafe_split_with_sizes(y, [size, y.shape[axis] - size], axis)[0]
    return y if len(leading) == 1 else torch.ops.aten._unsafe_view.default(y, (*leading, columns))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x before the products, or None outside autocast; float64 stays."""
    device = x.device.type
    if not _autocast_enabled(device):
        return None
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """The products have their own dtypes; and what is traced may run under another autocast than it is traced under."""
    needed = torch.compiler.is_compiling() or _autocast_enabled(device)
    return torch.autocast(device, enabled=False) if needed and device in _AUTOCAST_DEVICES else nullcontext()


def _autocast_enabled(device: str) -> bool:
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
