// Rounding of float32 values to 8 bits: docs/numerics.md, eq. 1 and section 4; the same operations in the
// same order as halo_train/ops/reference.py.

#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "quantize.h"

namespace halo_train {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

template <QType kType>
__host__ __device__ constexpr float qmax() {
  return kType == QType::kE4M3 ? 448.0f : kType == QType::kE5M2 ? 57344.0f : 127.0f;
}

// Magnitudes are compared as the bits of floats: NaN is above infinity there, so it is not lost as in fmaxf.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Largest of two, NaN if one is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float floored(uint32_t amax_bits) {
  const float amax = __uint_as_float(amax_bits);
  return amax < kAmaxFloor ? kAmaxFloor : amax;  // keeps NaN
}

// What a row with this largest magnitude is multiplied by before it is rounded, and what undoes it: the bits
// of quotients by __fdiv_rn, of every magnitude and every qmax() (csrc/tests/quotients.cu), but without
// branches, across which nothing else of a kernel would be scheduled.
__device__ __forceinline__ float inverse_of(uint32_t amax_bits, float qmax) {
  const float amax = floored(amax_bits);
  const bool large = amax > 0x1p64f;  // where the reciprocal might be subnormal
  const float x = large ? amax * 0x1p-64f : amax;
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  reciprocal = fmaf(fmaf(-x, reciprocal, 1.0f), reciprocal, reciprocal);
  const float q = qmax * reciprocal;
  const float inverse = fmaf(fmaf(-x, q, qmax), reciprocal, q) * (large ? 0x1p-64f : 1.0f);
  return amax_bits == kInfinityBits ? 0.0f : inverse;
}
template <QType kType>
__device__ __forceinline__ float inverse_of(uint32_t amax_bits) {
  return inverse_of(amax_bits, qmax<kType>());
}

__device__ __forceinline__ float scale_of(uint32_t amax_bits, float qmax, float inverse_qmax) {
  const float amax = floored(amax_bits), q = amax * inverse_qmax;
  const float scale = fmaf(fmaf(-qmax, q, amax), inverse_qmax, q);
  return amax_bits == 0 ? 1.0f : amax_bits == kInfinityBits ? amax : scale;
}
template <QType kType>
__device__ __forceinline__ float scale_of(uint32_t amax_bits) {
  return scale_of(amax_bits, qmax<kType>(), 1.0f / qmax<kType>());
}

// Two values to two bytes, the first in the lowest.
template <QType kType>
__device__ __forceinline__ uint32_t round2(float a, float b) {
  if constexpr (kType == QType::kInt8) {
    // |v| <= 127 up to rounding, so -128 does not occur; NaN becomes 0 and is told by the scale.
    uint32_t pair;
    asm("{\n\t"
        ".reg .s32 a, b;\n\t"
        "cvt.rni.s32.f32 a, %1;\n\t"
        "cvt.rni.s32.f32 b, %2;\n\t"
        "cvt.pack.sat.s8.s32.b32 %0, b, a, 0;\n\t"
        "}"
        : "=r"(pair)
        : "f"(a), "f"(b));
    return pair;
  } else {
    constexpr auto kInterpretation = kType == QType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kInterpretation);
  }
}

// Four values to four bytes, the first in the lowest.
template <QType kType>
__device__ __forceinline__ uint32_t round4(float a, float b, float c, float d) {
  if constexpr (kType == QType::kInt8) {
    uint32_t word;
    asm("{\n\t"
        ".reg .s32 a, b, c, d;\n\t"
        ".reg .b32 upper;\n\t"
        "cvt.rni.s32.f32 a, %1;\n\t"
        "cvt.rni.s32.f32 b, %2;\n\t"
        "cvt.rni.s32.f32 c, %3;\n\t"
        "cvt.rni.s32.f32 d, %4;\n\t"
        "cvt.pack.sat.s8.s32.b32 upper, d, c, 0;\n\t"
        "cvt.pack.sat.s8.s32.b32 %0, b, a, upper;\n\t"
        "}"
        : "=r"(word)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return word;
  } else {
    return round2<kType>(a, b) | round2<kType>(c, d) << 16;
  }
}

}  // namespace halo_train
