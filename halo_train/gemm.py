"""8-bit matrix products with row scales, by the GEMMs that PyTorch ships (cuBLASLt); the reference on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference
from .quantize import Quantized

MULTIPLE = 16
"""The float8 GEMM takes contracted and output dimensions that are multiples of 16; operands are padded to it."""

INT8_MAX_CONTRACTION = 131072
"""127 * 127 * 131072 < 2^31: longer int8 contractions are split so that an int32 sum cannot overflow."""

_INT_MM_MIN_ROWS = 32
"""torch._int_mm on CUDA requires more than 16 rows."""


def matmul(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
    """diag(a.scale) (a.data b.data^T) diag(b.scale).

    float8 products accumulate in the tensor core's float32 with fast accumulation (relative error 1.3e-3 at a
    contraction of 4096; docs/numerics.md, section 5); int8 products accumulate exactly.

    Args:
        a: data [M, K], scale [M] or []. b: data [N, K], scale [N] or []. On a GPU K and N are multiples of 16.
        out_dtype: of the result.

    Returns:
        [M, N], not differentiable.

    Raises:
        RuntimeError: a float8 product on a GPU without float8 tensor cores.
    """
    if not a.data.is_cuda or a.data.dtype not in reference.QMAX:
        return reference.scaled_matmul(a.data, b.data, a.scale, b.scale, out_dtype)
    if a.data.dtype == torch.int8:
        return _int8_cuda(a, b, out_dtype)
    return _float8_cuda(a, b, out_dtype)


def _float8_cuda(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
    _check_float8_gpu(a.data.device.index)
    if a.scale.dim() == b.scale.dim() == 0:
        # One scale a tensor: the GEMM writes every output dtype but float64.
        direct = torch.float32 if out_dtype == torch.float64 else out_dtype
        return _scaled_mm(a.data, b.data, a.scale.float(), b.scale.float(), direct).to(out_dtype)
    if out_dtype == torch.bfloat16 and a.scale.dim() == b.scale.dim() == 1:
        return _scaled_mm(a.data, b.data, a.scale[:, None].float(), b.scale[None, :].float(), out_dtype)
    # The library applies row scales for bfloat16 output only; raw sums stay in float32 (float16 would overflow).
    one = torch.ones((), device=a.data.device)
    return _apply_scales(_scaled_mm(a.data, b.data, one, one, torch.float32), a.scale, b.scale, out_dtype)


def _scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=True)


def _int8_cuda(a: Quantized, b: Quantized, out_dtype: torch.dtype) -> Tensor:
    rows = a.data.shape[0]
    data = a.data
    if rows < _INT_MM_MIN_ROWS:
        data = torch.nn.functional.pad(data, (0, 0, 0, _INT_MM_MIN_ROWS - rows))
    product: Tensor | None = None
    for start in range(0, data.shape[1], INT8_MAX_CONTRACTION):
        part = slice(start, start + INT8_MAX_CONTRACTION)
        # The operands of a part are strided views, which the GEMM takes as they are.
        partial = torch._int_mm(data[:, part], b.data[:, part].t())[:rows]
        product = partial if product is None else product.double() + partial
    assert product is not None
    return _apply_scales(product, a.scale, b.scale, out_dtype)


def _apply_scales(product: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    row = scale_a[:, None] if scale_a.dim() else scale_a
    return (product * row * scale_b).to(out_dtype)


@functools.cache
def _check_float8_gpu(device: int) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise RuntimeError(
            f"float8 products need a GPU of compute capability 8.9 or newer; got {torch.cuda.get_device_name(device)} "
            f"with {capability[0]}.{capability[1]}; use recipe='int8' or recipe='bf16'"
        )
