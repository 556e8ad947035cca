// Hadamard blocks of 256 16-bit elements, one load of a warp each, without shuffles or shared memory.
//
// First, products of the raw input with a +-1 matrix do index bits 0, 1, 3 and 4 (see sign_matrix). They
// leave bits 5 and 2 in registers and bits 6 and 7 in lanes 0 and 1.
//
// Then products of these fp32 sums do those four. A sum goes to the tensor cores, which take 11 bits of a
// significand, in two parts: its upper 11 bits exactly, and of what is left, at most 13 bits, the upper 11.
//
// The layouts of results and of inputs of a product are such that a lane ends with eight neighbours. An
// infinity makes its block NaN.

#pragma once

#include "hadamard_kernel.cuh"

namespace halo_train {

namespace detail {

// d = a b + c in tf32, of whose bits the lower 13 are not used.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float4& c) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
}

// Butterflies on lane bits 0 and 1 and on both bits of the register index. Lane bits 2, 3 and 4 move to
// register bit 0 and lane bits 0 and 1, those to lane bits 2, 3 and 4.
//
// k of the two products: lane bits 0 and 1, register bit 0; the second one has register bit 1 set. Rows:
// register bit 0, lane bits 0 and 1, register bit 1.
__device__ __forceinline__ void butterfly_products(float (&v)[4]) {
  const int lane = threadIdx.x & 31;
  const uint32_t one = 0x3f800000u ^ (__popc(lane >> 3 & lane & 3) & 1 ? 0x80000000u : 0u);
  const uint32_t other = one ^ (lane & 4 ? 0x80000000u : 0u);
  const uint32_t first[4] = {one, one, other, other};
  const uint32_t second[4] = {one, one ^ 0x80000000u, other, other ^ 0x80000000u};
  uint32_t upper[4], lower[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    upper[i] = __float_as_uint(v[i]) & 0xffffe000u;
    lower[i] = __float_as_uint(v[i] - __uint_as_float(upper[i]));
  }
  mma_tf32(v, first, lower[0], lower[1], make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  mma_tf32(v, second, lower[2], lower[3], make_float4(v[0], v[1], v[2], v[3]));
  mma_tf32(v, first, upper[0], upper[1], make_float4(v[0], v[1], v[2], v[3]));
  mma_tf32(v, second, upper[2], upper[3], make_float4(v[0], v[1], v[2], v[3]));
}

}  // namespace detail

template <typename T, int kThreads, bool kFactors>
__global__ void __launch_bounds__(kThreads) hadamard_warp_256(const HadamardParams<T> p) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * vector >= p.total) return;  // of whole warps
  const uint4 raw = detail::load_vector(p, vector);
  uint32_t a[4];
  detail::sign_matrix<T>(a);
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float sums[2][4];  // index bit 2; then bits 5 and 0
  detail::Pair<T>::mma(sums[0], a, make_uint2(raw.x, raw.y), zero);
  detail::Pair<T>::mma(sums[1], a, make_uint2(raw.z, raw.w), zero);
  float v[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float part[4] = {sums[0][2 * i], sums[0][2 * i + 1], sums[1][2 * i], sums[1][2 * i + 1]};
    detail::butterfly_products(part);  // index bits 1 and 2 in registers
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i | j << 1] = part[j];
  }
  if constexpr (kFactors) {
    // Of whole rows of blocks, each a warp: 32 bits hold their number.
    const uint32_t block = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, blocks = p.axis / 32;
    detail::multiply_values<8>(v, p.scale, p.out_scale + (block % blocks << 8) + ((threadIdx.x & 31) << 3));
  } else {
#pragma unroll
    for (float& value : v) value *= p.scale;
  }
  detail::store_values<8>(p.y + 8 * vector, v);
}

}  // namespace halo_train
