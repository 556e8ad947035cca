// Arithmetic on a tile of rotate_quantize_kernel.cuh: where the bits of an index sit in a warp, products, and
// lane bits that trade places with register bits.

#pragma once

#include <type_traits>

#include "hadamard_tile.cuh"

namespace halo_train {

// Index bits of a tile, from the lowest.
//     loads: pair of 16-bit values (0) | 16 bytes (1, 2) | lane 2 (3) | lanes 0, 1 (4, 5) | loads (6...) |
//            lanes 3, 4 (kLaneBit, kLaneBit + 1) | warps
//     after the products: registers (0..3) | lanes 2, 3, 4 (4, 5, 6) | registers (7...) | lanes 0, 1 | warps
template <int kLogValues_, int kLogWarps_>
struct RotateLayout {
  static constexpr int kLogValues = kLogValues_;
  static constexpr int kLogWarps = kLogWarps_;  // bits of a block beyond a tile
  static constexpr int kValues = 1 << kLogValues;
  static constexpr int kLoads = kValues / 8;
  static constexpr int kLaneBit = kLogValues + 3;
  static constexpr int kTileBits = kLaneBit + 2;
  static constexpr int kWarps = 1 << kLogWarps;
  static constexpr bool kExchange = kLogWarps > 0;

  // After the exchange a thread holds the kLowBits lowest bits and those from kLaneBit on.
  static constexpr int kLowBits = kLogValues - 2 - kLogWarps;
  static_assert(!kExchange || kLowBits >= 0, "more bits are left than a thread has registers");

  // Index of a register before the exchange.
  static __host__ __device__ constexpr int before(int i) { return (i & 15) | i >> 4 << 7; }
  static __host__ __device__ constexpr int after(int i) {
    return (i & ((1 << kLowBits) - 1)) | i >> kLowBits << kLaneBit;
  }

  // Shared-memory word of an index: three bits are added to bank bits 2 and 3, which makes the 16-byte writes
  // (lanes: kLaneBit, kLaneBit + 1, 4, 5, 6) and the reads of every width free of conflicts. word(a ^ b) =
  // word(a) ^ word(b).
  static __host__ __device__ constexpr int word(int index) {
    return index ^ ((index >> 5 ^ index >> kLaneBit) & 1) << 2 ^ (index >> (kLaneBit + 1) & 1) << 3;
  }
  // Only these bits of word(register) overlap with word(thread); the others may be added.
  static constexpr int kSwizzled = 3 << 2;
};

namespace detail {

// A fragment of the +-1 matrix for bits 0, 4, 5 and 6. k (column): bits 0, 4, 5, 6 of the index, as the loads
// bring them. m (row): bits 4, 5, 6, 0. Bits beyond the block are left alone: zeros, which can carry inf and
// NaN from one block into another, but only within a row, of which none is finite then.
__device__ __forceinline__ uint4 rotate_matrix(int log_block) {
  const int lane = threadIdx.x & 31, beyond = -1 << log_block;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = (lane >> 2) + 8 * (i & 1), k = 2 * (lane & 3) + h + 8 * (i >> 1);
      const int row = m >> 3 | (m & 7) << 4, column = (k & 1) | k >> 1 << 4;
      const uint32_t negative = __popc(row & column & ~beyond) & 1;
      if (!((row ^ column) & beyond)) pair |= (Pair<__nv_bfloat16>::kOne | negative << 15) << (16 * h);
    }
    a[i] = pair;
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

// Two neighbouring 16-bit values in float32; of bfloat16 an operation each instead of three for both.
template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t u) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
  } else {
    return Pair<T>::unpack(u);
  }
}

// Eight neighbouring values as sums of kCount bfloat16 terms; a product of a term with +-1 is exact.
template <int kCount>
struct Terms {
  uint32_t pair[kCount][4];

  // float32 values: exact in three terms, to 2^-17 in two.
  __device__ __forceinline__ void split(const float (&v)[8]) {
    using P = Pair<__nv_bfloat16>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 rest = make_float2(v[2 * i], v[2 * i + 1]);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
        pair[t][i] = P::pack(rest.x, rest.y);
        if (t + 1 == kCount) break;
        const float2 taken = widen_pair<__nv_bfloat16>(pair[t][i]);
        rest.x -= taken.x, rest.y -= taken.y;
      }
    }
  }
};

// The matrix and its negative: one of 4 registers more instead of flipped signs of every operand. From shared
// memory for every row, since the registers are wanted in between.
struct Signs {
  uint32_t plus[4], minus[4];
  __device__ __forceinline__ explicit Signs(const uint4& matrix)
      : plus{matrix.x, matrix.y, matrix.z, matrix.w} {
#pragma unroll
    for (int i = 0; i < 4; ++i) minus[i] = plus[i] ^ 0x80008000u;  // -0 for 0
  }
};

// d += a (b, the smallest terms first), or with the opposite sign. kNegated: the first term is that of -b.
template <bool kNegated, int kCount>
__device__ __forceinline__ void product(float (&d)[4], const Signs& a, const Terms<kCount>& low,
                                        const Terms<kCount>& high, int word, bool negative) {
  if constexpr (kCount == 1) {  // four registers are more than two operations there
    const uint32_t flip = negative ? 0x80008000u : 0;
    Pair<__nv_bfloat16>::mma(d, a.plus, make_uint2(low.pair[0][word] ^ flip, high.pair[0][word] ^ flip),
                             make_float4(d[0], d[1], d[2], d[3]));
  } else {
#pragma unroll
    for (int t = kCount - 1; t >= 0; --t) {
      Pair<__nv_bfloat16>::mma(d, negative != (kNegated && t == 0) ? a.minus : a.plus,
                               make_uint2(low.pair[t][word], high.pair[t][word]),
                               make_float4(d[0], d[1], d[2], d[3]));
    }
  }
}

// Step 1 for two loads, which differ in bit 6. v: bits 0, 1, 2 and 3 of the index.
template <bool kNegated, int kCount>
__device__ __forceinline__ void multiply_tile(const Terms<kCount>& low, const Terms<kCount>& high,
                                              const Signs& a, float* v) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    float first[4] = {};
    product<kNegated>(first, a, low, high, 2 * w, false);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float d[4] = {first[0], first[1], first[2], first[3]};
      product<kNegated>(d, a, low, high, 2 * w + 1, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[(i & 1) << 3 | w << 2 | b << 1 | i >> 1] = d[i];
    }
  }
}

// Butterfly on a register bit, and where `sign` is negative its results in the other order and the first
// negated: what trade_lanes() wants of the upper lane.
template <int kBit, int kValues>
__device__ __forceinline__ void butterfly_for_trade(float (&v)[kValues], float sign) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i >> kBit & 1) continue;
    const float a = v[i], b = v[i | 1 << kBit];
    v[i] = fmaf(sign, a, b);
    v[i | 1 << kBit] = fmaf(-sign, b, a);
  }
}

// A bit of the lane and a register bit trade places, and the former gets its butterfly. `sign` is negative in
// the upper lane: of the register bit it keeps the values with 1, negated, the lower lane those with 0.
template <int kBit, int kValues>
__device__ __forceinline__ void trade_lanes(float (&v)[kValues], int lane_mask, float sign) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i >> kBit & 1) continue;
    const float other = __shfl_xor_sync(0xffffffffu, v[i | 1 << kBit], lane_mask), own = v[i];
    v[i] = fmaf(sign, own, other);
    v[i | 1 << kBit] = fmaf(-sign, other, own);
  }
}

}  // namespace detail

}  // namespace halo_train
