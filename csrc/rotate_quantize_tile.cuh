// Arithmetic on a tile of rotate_quantize_kernel.cuh: where the bits of an index sit in a warp, products,
// factors of columns, and lane bits that trade places with register bits.

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
__device__ __forceinline__ void rotate_matrix(uint32_t (&a)[4], int log_block) {
  const int lane = threadIdx.x & 31, beyond = -1 << log_block;
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
}

// Eight factors, powers of two, as shared memory holds them: in bfloat16, or their exponents alone, where an
// exchange takes so much of it that the L1 cache would have too little left for the loads under way.
__device__ __forceinline__ void pack_factors(uint4& to, const float4& lo, const float4& hi) {
  using P = Pair<__nv_bfloat16>;
  to = make_uint4(P::pack(lo.x, lo.y), P::pack(lo.z, lo.w), P::pack(hi.x, hi.y), P::pack(hi.z, hi.w));
}
__device__ __forceinline__ void pack_factors(uint2& to, const float4& lo, const float4& hi) {
  const auto exponents = [](const float4& f) {
    const auto one = [](float v) { return __float_as_uint(v) >> 23 & 0xff; };
    return one(f.x) | one(f.y) << 8 | one(f.z) << 16 | one(f.w) << 24;
  };
  to = make_uint2(exponents(lo), exponents(hi));
}
__device__ __forceinline__ uint4 bfloat16_factors(const uint4& from) { return from; }
__device__ __forceinline__ uint4 bfloat16_factors(const uint2& from) {
  return make_uint4(__byte_perm(from.x, 0, 0x4140) << 7, __byte_perm(from.x, 0, 0x4342) << 7,
                    __byte_perm(from.y, 0, 0x4140) << 7, __byte_perm(from.y, 0, 0x4342) << 7);
}

// Eight neighbouring values, perhaps multiplied, as sums of bfloat16 terms, exact: a product of a term with
// +-1 is, too.
template <typename T>
struct Terms {
  static constexpr int kCount = sizeof(T) == 4 ? 3 : std::is_same_v<T, __half> ? 2 : 1;
  static constexpr int kQuads = sizeof(T) / 2;  // 16-byte pieces of eight values
  uint32_t pair[kCount][4];

  template <bool kScaled>
  __device__ __forceinline__ void set(const uint4 (&raw)[kQuads], const uint4& f) {
    const uint32_t factor[4] = {f.x, f.y, f.z, f.w};
    const uint32_t words[8] = {raw[0].x,          raw[0].y,          raw[0].z,          raw[0].w,
                               raw[kQuads - 1].x, raw[kQuads - 1].y, raw[kQuads - 1].z, raw[kQuads - 1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kCount == 1) {
        pair[0][i] = words[i];
        if constexpr (kScaled) {
          const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(words[i]),
                                                 reinterpret_cast<const __nv_bfloat162&>(factor[i]));
          pair[0][i] = reinterpret_cast<const uint32_t&>(product);
        }
      } else {
        float2 v;
        if constexpr (sizeof(T) == 2) {
          v = Pair<T>::unpack(words[i]);
        } else {
          v = make_float2(__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1]));
        }
        if constexpr (kScaled) {
          const float2 s = Pair<__nv_bfloat16>::unpack(factor[i]);
          v.x *= s.x, v.y *= s.y;
        }
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
          pair[t][i] = Pair<__nv_bfloat16>::pack(v.x, v.y);
          const float2 taken = Pair<__nv_bfloat16>::unpack(pair[t][i]);
          v.x -= taken.x, v.y -= taken.y;
        }
      }
    }
  }
};

// d += a (b, the smallest terms first), or with b's signs flipped.
template <typename T>
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], const Terms<T>& low,
                                        const Terms<T>& high, int word, bool negative) {
  const uint32_t flip = negative ? 0x80008000u : 0;
#pragma unroll
  for (int t = Terms<T>::kCount - 1; t >= 0; --t) {
    Pair<__nv_bfloat16>::mma(d, a, make_uint2(low.pair[t][word] ^ flip, high.pair[t][word] ^ flip),
                             make_float4(d[0], d[1], d[2], d[3]));
  }
}

// Step 1 for two loads, which differ in bit 6. v: bits 0, 1, 2 and 3 of the index.
template <typename T>
__device__ __forceinline__ void multiply_tile(const Terms<T>& low, const Terms<T>& high,
                                              const uint32_t (&a)[4], float* v) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    float first[4] = {};
    product(first, a, low, high, 2 * w, false);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float d[4] = {first[0], first[1], first[2], first[3]};
      product(d, a, low, high, 2 * w + 1, b);
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
