"""The library's operators as tables: schema and reference of each, and what serves it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import block_reference, fused_reference, norm_backward, product_reference, reference, signs

KERNEL_OPS = {
    "hadamard": "hadamard.cu",
    "hadamard_": "hadamard.cu",
    "hadamard_rounds": "hadamard_rounds_launch.cuh",
    "hadamard_rounds_": "hadamard_rounds_launch.cuh",
    "hadamard_axis": "hadamard_columns.cu",
    "quantize_rows": "quantize.cu",
    "quantize_rows_transposed": "quantize_grad.cu",
    "quantize_grad": "quantize_grad.cu",
    "quantize_grad_blocks": "grad_blocks.cu",
    "quantize_tiles": "quantize_tiles.cu",
    "transpose_bytes": "transpose.cu",
    "quantize_tensor": "quantize.cu",
    "norm_quantize": "norm_quantize.cu",
    "gated_quantize": "gated_quantize.cu",
    "gated_grad_quantize": "gated_grad.cu",
    "gated_grad_blocks": "gated_grad_blocks.cu",
    "equalizer_factors": "equalizer.cu",
    "moments": "moments.cu",
    "rounding_moments": "moments.cu",
    "scaled_matmul": "product_bindings.cpp",
    "matmul_rows": "product_bindings.cpp",
    "matmul_weight_rows": "product_bindings.cpp",
    "matmul_weight_columns": "product_bindings.cpp",
    "matmul_rounded": "product_bindings.cpp",
    "matmul_gradients": "product_bindings.cpp",
    "matmul_rotated": "product_bindings.cpp",
}
"""Ops that have a CUDA kernel, and the file in ``csrc/`` that holds it."""

TRITON_OPS: dict[str, Callable[..., Any]] = {
    "rms_norm_backward": norm_backward.rms_norm_backward,
}
"""Ops whose implementation on a GPU is in Python, with a Triton kernel where that can run."""

GENERIC_OPS = frozenset({"copy_after", "random_signs", "random_bits", "int8_matmul"})
"""Ops whose reference serves every device: for compiled graphs only, and the int8 product where its kernel does not run."""

SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "hadamard": (
        "(Tensor x, int block, float scale, Tensor? signs=None, Tensor? out_scale=None, Tensor? matrix=None) -> Tensor",
        reference.hadamard,
    ),
    "hadamard_": (
        "(Tensor(a!) x, int block, float scale, Tensor? signs=None, Tensor? out_scale=None, Tensor? matrix=None) -> ()",
        reference.hadamard_,
    ),
    "hadamard_rounds": (
        "(Tensor x, int block, float scale, Tensor? first, Tensor middle, Tensor? last) -> Tensor",
        reference.hadamard_rounds,
    ),
    "hadamard_rounds_": (
        "(Tensor(a!) x, int block, float scale, Tensor? first, Tensor middle, Tensor? last) -> ()",
        reference.hadamard_rounds_,
    ),
    "hadamard_axis": (
        "(Tensor x, int block, float scale, Tensor? signs=None) -> Tensor",
        reference.hadamard_axis,
    ),
    "quantize_rows": (
        "(Tensor x, ScalarType dtype, int block, Tensor? col_scale) -> (Tensor, Tensor)",
        reference.quantize_rows,
    ),
    "quantize_rows_transposed": (
        "(Tensor x, ScalarType dtype, Tensor? row_scale) -> (Tensor, Tensor)",
        reference.quantize_rows_transposed,
    ),
    "quantize_grad": (
        "(Tensor e, ScalarType dtype, Tensor? col_scale, Tensor row_scale, bool column_sums) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference.quantize_grad,
    ),
    "quantize_grad_blocks": (
        "(Tensor e, ScalarType dtype, Tensor? col_scale, Tensor row_scale, bool column_sums) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
        block_reference.quantize_grad_blocks,
    ),
    "quantize_tiles": (
        "(Tensor x, ScalarType dtype, Tensor? divisor, Tensor? row_scale, Tensor? col_scale) -> (Tensor, Tensor)",
        block_reference.quantize_tiles,
    ),
    "transpose_bytes": ("(Tensor x) -> Tensor", reference.transpose_bytes),
    "equalizer_factors": ("(Tensor exponent) -> (Tensor, Tensor)", reference.equalizer_factors),
    "quantize_tensor": (
        "(Tensor x, ScalarType dtype, int block, Tensor? col_scale) -> (Tensor, Tensor)",
        reference.quantize_tensor,
    ),
    "norm_quantize": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center, ScalarType dtype, int block, Tensor? col_scale)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        fused_reference.norm_quantize,
    ),
    "rms_norm_backward": (
        "(Tensor[] dys, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
        fused_reference.rms_norm_backward,
    ),
    "gated_quantize": (
        "(Tensor gate, Tensor up, str activation, ScalarType dtype, int block, Tensor? col_scale) -> (Tensor, Tensor)",
        fused_reference.gated_quantize,
    ),
    "gated_grad_quantize": (
        "(Tensor dh, Tensor gate, Tensor up, str activation, ScalarType dtype, Tensor row_scale, "
        "Tensor? gate_col_scale, Tensor? up_col_scale) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fused_reference.gated_grad_quantize,
    ),
    "gated_grad_blocks": (
        "(Tensor dh, Tensor gate, Tensor up, str activation, ScalarType dtype, Tensor row_scale, "
        "Tensor? gate_col_scale, Tensor? up_col_scale) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        block_reference.gated_grad_blocks,
    ),
    "moments": ("(Tensor x) -> (Tensor, Tensor)", reference.moments),
    "rounding_moments": (
        "(Tensor x, Tensor data, Tensor scale, float largest, int counted) -> (Tensor, Tensor, Tensor)",
        reference.rounding_moments,
    ),
    "int8_matmul": (
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype) -> Tensor",
        reference.int8_matmul,
    ),
    "scaled_matmul": (
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool fast_accum) -> Tensor",
        reference.scaled_matmul,
    ),
    "matmul_rows": (
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool fast_accum) -> Tensor",
        reference.matmul_rows,
    ),
    "matmul_weight_rows": (
        "(Tensor a, Tensor scale_a, Tensor weight, int block, Tensor? col_scale, ScalarType out_dtype, bool fast_accum)"
        " -> (Tensor, Tensor)",
        product_reference.matmul_weight_rows,
    ),
    "matmul_weight_columns": (
        "(Tensor a, Tensor scale_a, Tensor weight, Tensor? row_scale, ScalarType dtype, ScalarType out_dtype, bool fast_accum)"
        " -> Tensor",
        product_reference.matmul_weight_columns,
    ),
    "matmul_rounded": (
        "(Tensor x, Tensor? x_col_scale, Tensor weight, Tensor? weight_col_scale, ScalarType dtype, int block, "
        "ScalarType out_dtype, bool fast_accum, bool columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        product_reference.matmul_rounded,
    ),
    "matmul_gradients": (
        "(Tensor e, Tensor? e_col_scale, Tensor weight, Tensor? weight_row_scale, Tensor x, Tensor x_scale, Tensor x_col_scale, "
        "ScalarType grad_dtype, int block, Tensor? col_scale, ScalarType out_dtype, bool column_sums, bool fast_accum, bool blocks) -> "
        "(Tensor, Tensor, Tensor)",
        product_reference.matmul_gradients,
    ),
    "matmul_rotated": (
        "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, bool rows, int block, Tensor? col_scale, ScalarType out_dtype, "
        "bool fast_accum) -> Tensor",
        product_reference.matmul_rotated,
    ),
    "copy_after": ("(Tensor x, Tensor e) -> Tensor", reference.copy_after),
    "random_signs": ("(Tensor like, int n, int seed, int stream) -> Tensor", signs.random_signs),
    "random_bits": ("(Tensor like, int n, int seed, int stream) -> Tensor", signs.random_bits),
}
