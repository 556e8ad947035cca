// Arithmetic on a tile of rotate_quantize_kernel.cuh: where the bits of an index sit in a warp, products of
// inputs and of their sums, and a bit of the warp that trades places with a register bit.

#pragma once

#include <type_traits>

#include "hadamard_tile.cuh"

namespace halo_train {

// Index bits of a tile, from the lowest.
//     loads: pair of 16-bit values (0) | 16 bytes (1, 2) | lane 2 (3) | lanes 0, 1 (4, 5) | loads (6...) |
//            lanes 3, 4 (kLaneBit, kLaneBit + 1) | warps
//     after the products: registers (0..3) | lanes 2, 3, 4 (4, 5, 6) | registers (7...) | lanes 0, 1 | warps
// kLogWarps: bits of a block beyond a tile. kWhole: rows are made of whole tiles. kLineInLanes: bits 6 and
// kLaneBit have changed places, so that 8 lanes store to 4 groups of banks instead of 2; for blocks that have
// products of sums for the bits in lanes, and kLaneBit.
template <int kLogValues_, int kLogWarps_, bool kWhole_, bool kLineInLanes_>
struct RotateLayout {
  static constexpr bool kLineInLanes = kLineInLanes_;
  static constexpr int kLoadBit = kLineInLanes ? 7 : 6;  // the lowest of the loads
  static constexpr int kLogValues = kLogValues_;
  static constexpr int kLogWarps = kLogWarps_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kValues = 1 << kLogValues;
  static constexpr int kLoads = kValues / 8;
  static constexpr int kLaneBit = kLogValues + 3;
  static constexpr int kTileBits = kLaneBit + 2;
  static constexpr int kWarps = 1 << kLogWarps;

  // Two warps of a block trade one register bit for theirs; more exchange all values.
  static constexpr bool kTrade = kLogWarps == 1, kExchange = kLogWarps > 1;
  static constexpr int kTraded = 4;
  static constexpr int kGiven = kTrade      ? kValues / 2
                                : kExchange ? kValues
                                            : 0;  // by a thread, to other warps

  // After the exchange a thread holds the kLowBits lowest bits and those from kLaneBit on.
  static constexpr int kLowBits = kLogValues - 2 - kLogWarps;
  static_assert(!kExchange || kLowBits >= 0, "more bits are left than a thread has registers");

  // Index of a register, as the products leave it and after the exchange; of a lane, as they leave it.
  static __host__ __device__ constexpr int before(int i) { return (i & 15) | i >> 4 << (kLoadBit + 1); }
  static __host__ __device__ constexpr int after(int i) {
    return (i & ((1 << kLowBits) - 1)) | i >> kLowBits << kLaneBit;
  }
  static __host__ __device__ constexpr int of_lane(int lane) {
    return in_lanes(lane & 3) | (lane >> 2 & 3) << 4 | (lane >> 4) << kLoadBit;
  }
  // Two bits: of lanes 3 and 4 in loads, of 0 and 1 after the products.
  static __host__ __device__ constexpr int in_lanes(int two) {
    return kLineInLanes ? (two & 1) << 6 | two >> 1 << (kLaneBit + 1) : two << kLaneBit;
  }
  // The same where bits 4 and 5 are twisted.
  static __host__ __device__ constexpr int of_lane(int lane, int twist) {
    return (lane & 3) << kLaneBit | (lane >> 3 ^ (lane & twist)) << 4 | (lane >> 2 & 1) << 6;
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

// A fragment of the +-1 matrix for bits 0, 4, 5 and kLoadBit. k (column): bits 0, 4, 5 and kLoadBit of the
// index, as the loads bring them. m (row): bits 4, 5, kLoadBit and 0, or twisted 6, 4, 5 and 0. Bits beyond
// the block are left alone: zeros, which can carry inf and NaN from one block into another, but only within a
// row, of which none is finite then.
template <typename L>
__device__ __forceinline__ uint4 rotate_matrix(int log_block, bool twisted) {
  const int lane = threadIdx.x & 31, beyond = -1 << log_block;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = (lane >> 2) + 8 * (i & 1), k = 2 * (lane & 3) + h + 8 * (i >> 1);
      const int three = twisted ? m >> 1 & 3 | (m & 1) << 2 : m & 7;
      const int row = m >> 3 | (three & 3) << 4 | three >> 2 << L::kLoadBit;
      const int column = (k & 1) | (k >> 1 & 3) << 4 | k >> 3 << L::kLoadBit;
      const uint32_t negative = __popc(row & column & ~beyond) & 1;
      if (!((row ^ column) & beyond)) pair |= (Pair<__nv_bfloat16>::kOne | negative << 15) << (16 * h);
    }
    a[i] = pair;
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

// Where no products of sums follow, lanes 0 and 1 of what the products give are added to bits 4 and 5 of its
// index (those of them that the block has), so that 8 lanes store to 8 groups of banks instead of 2. A row of
// the matrix whose index is moved is that row with other signs, which the operands take.
__device__ __forceinline__ int twist_of(int log_block) { return ((1 << log_block) - 1) >> 4 & 3; }
__device__ __forceinline__ float twist_sign(int lane, int twist) {
  return __popc(lane & lane >> 3 & twist) & 1 ? -1.0f : 1.0f;
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
// kFlips: signs of operands instead of the negative of the matrix.
template <bool kNegated, bool kFlips, int kCount>
__device__ __forceinline__ void product(float (&d)[4], const Signs& a, const Terms<kCount>& low,
                                        const Terms<kCount>& high, int word, bool negative) {
  if constexpr (kFlips) {
    static_assert(kCount == 1 && !kNegated, "of one term");
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

// Step 1 for two loads, which differ in bit kLoadBit. v: bits 0, 1, 2 and 3 of the index.
template <bool kNegated, bool kFlips, int kCount>
__device__ __forceinline__ void multiply_tile(const Terms<kCount>& low, const Terms<kCount>& high,
                                              const Signs& a, float* v) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    float first[4] = {};
    product<kNegated, kFlips>(first, a, low, high, 2 * w, false);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float d[4] = {first[0], first[1], first[2], first[3]};
      product<kNegated, kFlips>(d, a, low, high, 2 * w + 1, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[(i & 1) << 3 | w << 2 | b << 1 | i >> 1] = d[i];
    }
  }
}

// Second operands of multiply_sums(), with k (rows) and n (columns): bits 3 and, in lanes, kLaneBit (or 6)
// and kLaneBit + 1 of the index. signs: x and y for the lower half of the results, z and w for the upper one,
// each of both halves of the values.
struct SumMatrix {
  uint4 signs;
  uint32_t minus_identity;
};

// Bits beyond the block are left alone, as in rotate_matrix().
template <typename L>
__device__ __forceinline__ SumMatrix sum_matrix(int log_block) {
  const int lane = threadIdx.x & 31, n = lane >> 2, beyond = -1 << (log_block - L::kLaneBit + 1);
  uint32_t signs = 0, minus_identity = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int k = 2 * (lane & 3) + h;
    const uint32_t one = Pair<__nv_bfloat16>::kOne, negative = __popc(k & n & ~beyond) & 1;
    if (!((k ^ n) & beyond)) signs |= (one | negative << 15) << (16 * h);
    if (k == n) minus_identity |= (one | 1u << 15) << (16 * h);
  }
  const bool halves = log_block >= L::kLaneBit;
  const uint32_t other = halves ? signs : 0, upper = halves ? signs ^ 0x80008000u : signs;
  return {make_uint4(signs, other, other, upper), minus_identity};
}

// Butterflies on four bits of products' results, which all stay where they are: the lowest of the register
// index (of four), lane bits 0 and 1, and that between `low` and `high`. Products of the values, in two
// bfloat16 terms each, with a +-1 matrix; what a product gives is laid out as the first operand of the next
// one. So the second terms are products too, v - first I.
struct QuadTerms {
  uint32_t first[4], second[4];

  __device__ __forceinline__ QuadTerms(float (&low)[4], float (&high)[4], const SumMatrix& b) {
    using P = Pair<__nv_bfloat16>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float (&rest)[4] = half == 0 ? low : high;
      uint32_t* a = first + 2 * half;
      a[0] = P::pack(rest[0], rest[1]), a[1] = P::pack(rest[2], rest[3]);
      asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(rest[0]), "+f"(rest[1]), "+f"(rest[2]), "+f"(rest[3])
          : "r"(a[0]), "r"(a[1]), "r"(b.minus_identity));
      second[2 * half] = P::pack(rest[0], rest[1]), second[2 * half + 1] = P::pack(rest[2], rest[3]);
    }
  }
  // The products of the second terms, and of the first ones, for the lower or the upper half of the results.
  __device__ __forceinline__ void begin(float (&d)[4], const SumMatrix& b, int half) const {
    Pair<__nv_bfloat16>::mma(d, second, signs(b, half), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  __device__ __forceinline__ void end(float (&d)[4], const SumMatrix& b, int half) const {
    Pair<__nv_bfloat16>::mma(d, first, signs(b, half), make_float4(d[0], d[1], d[2], d[3]));
  }

 private:
  static __device__ __forceinline__ uint2 signs(const SumMatrix& b, int half) {
    return half == 0 ? make_uint2(b.signs.x, b.signs.y) : make_uint2(b.signs.z, b.signs.w);
  }
};

// The same on bit 3 of the register index, on its highest and on lane bits 0 and 1.
template <int kValues>
__device__ __forceinline__ void multiply_sums(float (&v)[kValues], const SumMatrix& b) {
  constexpr int kHalf = kValues / 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    if (i & 9) continue;
    float quads[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = v + i + half * kHalf;
      quads[half][0] = from[0], quads[half][1] = from[8], quads[half][2] = from[1], quads[half][3] = from[9];
    }
    const QuadTerms terms(quads[0], quads[1], b);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      terms.begin(quads[half], b, half);
      terms.end(quads[half], b, half);
      float* to = v + i + half * kHalf;
      to[0] = quads[half][0], to[8] = quads[half][1], to[1] = quads[half][2], to[9] = quads[half][3];
    }
  }
}

// Two warps of a block: bit kTraded of the register index gets its butterfly and trades places with the bit
// of the warp. A warp keeps half of its values and gets the other half of what the other one keeps, by way of
// `mine` and `others`, 16 bytes for each lane of a warp. The upper one keeps differences, with the opposite
// sign: the lower registers are what is kept in both. barrier(): of the two.
template <typename L, typename Barrier>
__device__ __forceinline__ void trade_values(float (&v)[L::kValues], float4* mine, const float4* others,
                                             bool upper, const Barrier& barrier) {
  constexpr int kBit = 1 << L::kTraded;
  const float sign = upper ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) {
    if (i & kBit) continue;
    const float a = v[i], b = v[i | kBit];
    v[i] = fmaf(sign, a, b);
    v[i | kBit] = fmaf(-sign, b, a);
  }
  const auto given = [](int i) { return (4 * i & (kBit - 1)) | kBit | 4 * i / kBit * 2 * kBit; };
#pragma unroll
  for (int i = 0; i < L::kGiven / 4; ++i) {
    const float* from = v + given(i);
    mine[32 * i] = make_float4(from[0], from[1], from[2], from[3]);
  }
  barrier();
#pragma unroll
  for (int i = 0; i < L::kGiven / 4; ++i) {
    const float4 f = others[32 * i];
    float* to = v + given(i);
    to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
  }
}

// The last butterfly, with the scale in it; after trade_values() for the upper warp.
template <int kBit, int kValues>
__device__ __forceinline__ void last_butterfly(float (&v)[kValues], float scale, bool upper) {
  if (!upper) return butterfly_registers_scaled<kBit>(v, scale);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i >> kBit & 1) continue;
    const float a = v[i | 1 << kBit] * scale, b = v[i];
    v[i] = fmaf(-b, scale, a);
    v[i | 1 << kBit] = fmaf(b, scale, a);
  }
}

}  // namespace detail

}  // namespace halo_train
