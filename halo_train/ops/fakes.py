"""What every operator returns but for the values: shapes and dtypes, for tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import EXPONENTS, SCALE_BLOCK


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _hadamard(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _quantize_rows(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=_wide(x))


def _quantize_rows_transposed(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[1], x.shape[0]), dtype=dtype), x.new_empty(x.shape[1:], dtype=_wide(x))


def _quantize_grad(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, u = _quantize_rows(e, dtype)
    b, v = _quantize_rows_transposed(e, dtype)
    return a, u, b, v, e.new_empty(e.shape[1] if column_sums else 0, dtype=v.dtype)


def _blocks(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((-(-x.shape[1] // SCALE_BLOCK), x.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scales


def _quantize_grad_blocks(
    e: Tensor, dtype: torch.dtype, col_scale: Tensor | None, row_scale: Tensor, column_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = e.new_empty(e.shape[1] if column_sums else 0, dtype=_wide(e))
    return (*_blocks(e, dtype), *_blocks(e.t(), dtype), sums)


def _quantize_tiles(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    n, k = x.shape
    scale = x.new_empty((-(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK)), dtype=torch.float32)
    return x.new_empty((k, n), dtype=dtype), scale


def _equalizer_factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    d = exponent.new_empty(exponent.shape, dtype=torch.float32)
    return d, torch.empty_like(d)


def _quantize_tensor(x: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=_wide(x))


def _matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, *_: Any
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _matmul_rows(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, *_: Any
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _matmul_weight_rows(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    scale = weight.new_empty(weight.shape[0], dtype=scale_a.dtype)
    return a.new_empty((a.shape[0], weight.shape[0]), dtype=out_dtype), scale


def _matmul_weight_columns(
    a: Tensor,
    scale_a: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return a.new_empty((a.shape[0], weight.shape[1]), dtype=out_dtype)


def _matmul_rounded(
    x: Tensor,
    x_col_scale: Tensor | None,
    weight: Tensor,
    weight_col_scale: Tensor | None,
    dtype: torch.dtype,
    block: int,
    out_dtype: torch.dtype,
    fast_accum: bool,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    data, scale = _quantize_rows(x, dtype)
    tiles = scale.new_empty(0)
    if columns:
        data, tiles = _quantize_tiles(x, dtype)
    weight_scale = weight.new_empty(weight.shape[0], dtype=scale.dtype)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype), data, scale, tiles, weight_scale


def _matmul_gradients(
    e: Tensor,
    e_col_scale: Tensor | None,
    weight: Tensor,
    weight_row_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    x_col_scale: Tensor,
    grad_dtype: torch.dtype,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    column_sums: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = e.new_empty(e.shape[1] if column_sums else 0, dtype=_wide(e))
    return e.new_empty((e.shape[0], weight.shape[1]), dtype=out_dtype), weight.new_empty(weight.shape), sums


def _matmul_rotated(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    rows: bool,
    block: int,
    col_scale: Tensor | None,
    out_dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1 if rows else 0]), dtype=out_dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64
    return x.new_empty((3, x.shape[0]), dtype=wide), x.new_empty((2, x.shape[1]), dtype=wide)


def _rounding_moments(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, columns = x.shape
    wide = torch.float64
    exponents = x.new_empty((batch, EXPONENTS), dtype=torch.int32)
    return x.new_empty((batch, 7, rows), dtype=wide), x.new_empty((batch, 2, columns), dtype=wide), exponents


def _norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty((x.shape[0], 1), dtype=_wide(x))
    return (*_quantize_rows(x, dtype), torch.empty_like(rstd) if center else rstd.new_empty(0), rstd)


def _rms_norm_backward(dys: list[Tensor], x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[1:], dtype=_wide(x))


def _gated_quantize(
    gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    return _quantize_rows(gate, dtype)


def _gated_grad_quantize(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, ...]:
    rows = [*_quantize_rows(dh, dtype), *_quantize_rows(dh, dtype)]
    return (*rows, *_quantize_rows_transposed(dh, dtype), *_quantize_rows_transposed(dh, dtype))


def _gated_grad_blocks(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, ...]:
    rows = [*_blocks(dh, dtype), *_blocks(dh, dtype)]
    return (*rows, *_blocks(dh.t(), dtype), *_blocks(dh.t(), dtype))


FAKES: dict[str, Callable[..., Any]] = {
    "hadamard": _hadamard,
    "hadamard_": lambda *_: None,
    "hadamard_rounds": _hadamard,
    "hadamard_rounds_": lambda *_: None,
    "hadamard_axis": _hadamard,
    "quantize_rows": _quantize_rows,
    "quantize_rows_transposed": _quantize_rows_transposed,
    "quantize_grad": _quantize_grad,
    "quantize_grad_blocks": _quantize_grad_blocks,
    "quantize_tiles": _quantize_tiles,
    "transpose_bytes": lambda x: x.new_empty((x.shape[1], x.shape[0])),
    "equalizer_factors": _equalizer_factors,
    "quantize_tensor": _quantize_tensor,
    "norm_quantize": _norm_quantize,
    "rms_norm_backward": _rms_norm_backward,
    "gated_quantize": _gated_quantize,
    "gated_grad_quantize": _gated_grad_quantize,
    "gated_grad_blocks": _gated_grad_blocks,
    "moments": _moments,
    "rounding_moments": _rounding_moments,
    "int8_matmul": _matmul,
    "scaled_matmul": _matmul,
    "matmul_rows": _matmul_rows,
    "matmul_weight_rows": _matmul_weight_rows,
    "matmul_weight_columns": _matmul_weight_columns,
    "matmul_rounded": _matmul_rounded,
    "matmul_gradients": _matmul_gradients,
    "matmul_rotated": _matmul_rotated,
    "copy_after": lambda x, e: torch.empty_like(x),
    "random_signs": lambda like, n, *_: like.new_empty(n, dtype=torch.int8),
    "random_bits": lambda like, n, *_: like.new_empty((n + 7) // 8, dtype=torch.uint8),
}
