// One tile of the Hadamard kernels: where the bits of an index sit in a warp, and the butterflies on them.
//
// A warp holds a tile of 32 * kValues elements. Index bits, from the lowest, sit in
//     16-byte vector | lanes 0..2 (one 128-byte line) | kLoads registers | lanes 3 and 4 | warps
// so that short blocks have no index bit in lanes 3 and 4 (those take neighbouring blocks) and need no
// shuffle there. Each index bit below kLogN gets one butterfly, in whatever place it happens to be:
//
// 1. 16-bit input: tensor-core products with a constant +-1 matrix do bits 0, 1, 3 and 4, and optionally 2.
//    Products of the raw input with +-1 are exact and sums are fp32, so nothing is rounded. The layout of the
//    result also moves bit 5 from a lane into a register. fp32 input: registers and shuffles, or registers
//    and an exchange through shared memory within the warp (kTrade).
// 2. Register bits; then lanes 3 and 4 by shuffles where they belong to the block.
// 3. Blocks of at least a tile: one fp32 exchange through shared memory turns the other bits into
//    register bits.
// 4. One multiplication by the scale, one rounding, one store.
//
// Bits are done in ascending order within 1 and then from 2 on, but for a top bit that is done first
// (kTopFirst, kLogParts) and for those of a trade, which come after those of registers. For one n and type
// the sums are the same for every number of rows (but for float32 and n = 32768 before Hopper, where few rows
// are halved, see kLogParts).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace halo_train {

namespace detail {

template <typename T>
struct Pair;  // two neighbouring 16-bit values in one register

template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint32_t kOne = 0x3f80;
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(u));
  }
  // d = a b + c
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, uint2 b, float4 c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(c.x), "f"(c.y), "f"(c.z),
          "f"(c.w));
  }
};

template <>
struct Pair<__half> {
  static constexpr uint32_t kOne = 0x3c00;
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    return __half22float2(reinterpret_cast<const __half2&>(u));
  }
  // d = a b + c
  static __device__ __forceinline__ void mma(float* d, const uint32_t* a, uint2 b, float4 c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "f"(c.x), "f"(c.y), "f"(c.z),
          "f"(c.w));
  }
};

template <typename V>
__device__ __forceinline__ void butterfly(V& a, V& b) {
  const V t = a;
  a = t + b;
  b = t - b;
}

// Butterfly on one bit of the register index.
template <int kBit, typename V, int kValues>
__device__ __forceinline__ void butterfly_registers(V (&v)[kValues]) {
  static_assert((2 << kBit) <= kValues, "the bit must be one of the register index");
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (!(i >> kBit & 1)) butterfly(v[i], v[i | 1 << kBit]);
  }
}

// The last butterfly with the scale in it: three operations for two values instead of four.
template <int kBit, int kValues>
__device__ __forceinline__ void butterfly_registers_scaled(float (&v)[kValues], float scale) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i >> kBit & 1) continue;
    const float a = v[i] * scale;
    const float b = v[i | 1 << kBit];
    v[i] = fmaf(b, scale, a);
    v[i | 1 << kBit] = fmaf(-b, scale, a);
  }
}

// Butterfly on one bit of the lane index.
template <int kValues>
__device__ __forceinline__ void butterfly_lanes(float (&v)[kValues], int lane_mask) {
  const float sign = threadIdx.x & lane_mask ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    v[i] = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], lane_mask));
  }
}

}  // namespace detail

// Where the bits of an index are; the only place that knows. kShuffled of the lane bits 3 and 4 are done by
// shuffles before the exchange between warps (all of them when there is none).
template <typename T_, int kLogN_, int kLogValues_, int kShuffled_ = 2, bool kFiveBits_ = false,
          int kLogParts_ = 0, bool kTopFirst_ = false, bool kTrade_ = false>
struct HadamardLayout {
  using T = T_;
  static constexpr int kLogN = kLogN_;
  static constexpr int kLogValues = kLogValues_;
  static constexpr int kValues = 1 << kLogValues;

  static constexpr int kVectorBits = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kVector = 1 << kVectorBits;
  static constexpr int kLineBit = kVectorBits + 3;
  static constexpr int kLogLoads = kLogValues - kVectorBits;
  static constexpr int kLoads = 1 << kLogLoads;
  // The upper half of the loads is that of the block, and the top bit is done first, with the same sums as in
  // blocks of two parts.
  static constexpr bool kTopFirst = kTopFirst_;
  static constexpr int kLogLines = kLogLoads - (kTopFirst ? 1 : 0);  // loads of one half
  static constexpr int kLaneBit = kLineBit + kLogLines;  // lanes 3 and 4 hold bits kLaneBit and kLaneBit + 1
  static constexpr int kWarpBit = kLaneBit + 2;
  static constexpr bool kExchange = kLogN >= kWarpBit;      // a tile lies within a block
  static constexpr int kTop = kLogN - (kTopFirst ? 1 : 0);  // bits from here on are done first
  static constexpr int kLogWarps = kExchange ? kTop - kWarpBit : 0;
  static constexpr int kWarps = 1 << kLogWarps;  // that share a block
  static_assert(kLogLoads >= 0, "a tile is at least one 16-byte load");
  static_assert(!kTopFirst || (kLogLoads > 0 && kExchange), "a load of either half");

  // Offset of a thread's j-th load.
  static __host__ __device__ constexpr int load(int j) {
    return (j & ((1 << kLogLines) - 1)) << kLineBit | j >> kLogLines << (kLogN - 1);
  }

  // The smallest kernel serves all blocks up to its own with masks: a product with a matrix that has zeros
  // would carry inf and NaN from one block into the next, so it does not use the tensor cores.
  static constexpr int kLogSmall = sizeof(T) == 2 ? 4 : 5;
  static constexpr bool kSmall = kLogN <= kLogSmall;
  static constexpr bool kTensor = sizeof(T) == 2 && !kSmall;
  static constexpr bool kFiveBits = kTensor && kFiveBits_;  // bit 2 as well as 0, 1, 3 and 4
  static_assert(!kSmall || kLogValues == kVectorBits, "small blocks lie within one load of a warp");

  static constexpr int kShuffled = kShuffled_;

  // The five bits of lanes by an exchange within the warp instead of shuffles, see trade_in_warp.
  static constexpr bool kTrade = kTrade_;
  static_assert(!kTrade || (sizeof(T) == 4 && kLogValues == 5 && kShuffled == 2 && kExchange),
                "as many lanes' bits as bits of registers");

  // After the exchange a thread holds the kLowBits lowest and the kHighBits highest index bits.
  static constexpr int kDone = kLaneBit + kShuffled;  // bits below are done before the exchange
  static constexpr int kFree = kLogValues - (kTop - kDone);
  static_assert(!kExchange || kFree >= 0, "too many bits left for the registers of a thread: shuffle more");
  static constexpr int kLowBits = kFree < kVectorBits ? kFree : kVectorBits;
  static constexpr int kHighBits = kLogValues - kLowBits;
  static constexpr int kHighBit = kTop - kHighBits;
  // The first of its elements.
  static __host__ __device__ constexpr int out(int thread) {
    constexpr int kBits = kHighBit - kLowBits;
    return (thread & ((1 << kBits) - 1)) << kLowBits | thread >> kBits << kTop;
  }

  // A block of 2^(kLogN + 1) whose top bit is done first, by the sums or differences of its two parts: a task
  // then is one half of the result, which reads the whole block and goes on as a block of 2^kLogN.
  static constexpr int kLogParts = kLogParts_;
  static constexpr int kParts = 1 << kLogParts;
  static_assert(kParts <= 2, "a block has one or two parts");

  static constexpr size_t kSharedBytes = sizeof(float) << kLogN;

  // Shared-memory word of an index. Two bits are added to bank bits 2 and 4, which makes the 8-byte writes
  // (lanes: bits kLaneBit, kLaneBit + 1, 1, 3, 4) and the reads of every width conflict-free. word(a ^ b) =
  // word(a) ^ word(b). For a trade the bits of the loads are added to bank bits 2 to 4, since they are in
  // lanes then.
  static __host__ __device__ constexpr int word(int index) {
    if constexpr (kTrade) return index ^ (index >> 5 & 7) << 2;
    return index ^ ((index >> 5 ^ index >> kLaneBit) & 1) << 2 ^ (index >> (kLaneBit + 1) & 1) << 4;
  }
  // Only these bits of word(constant) overlap with word(thread's part); the others may be added.
  static constexpr int kSwizzled = 1 << 2 | 1 << 4;
};

namespace detail {

// A fragment of the +-1 matrix for bits 0, 1, 3 and 4. k (column): bits 0, 3, 4, 1 of the index, as the loads
// bring them. m (row): bits 1, 3, 4, 0, so that bit 0 stays in a register and pairs can be packed. a[i] holds
// row (lane >> 2) + 8 (i & 1), columns 2 (lane & 3) + 8 (i >> 1) and the next: bits 3 and 4 of row and column
// are in lanes 3, 4 and 0, 1, bit 1 in lane 2 and i >> 1, bit 0 in i & 1 and the half of the register.
template <typename T>
__device__ __forceinline__ void sign_matrix(uint32_t (&a)[4]) {
  constexpr uint32_t kOnes = Pair<T>::kOne | Pair<T>::kOne << 16;
  const int lane = threadIdx.x & 31;
  a[0] = kOnes ^ (__popc(lane >> 3 & lane & 3) & 1 ? 0x80008000u : 0u);
  a[1] = a[0] ^ 0x80000000u;
  a[2] = a[0] ^ (lane & 4 ? 0x80008000u : 0u);
  a[3] = a[2] ^ 0x80000000u;
}

__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }

template <typename T>
__device__ __forceinline__ void flip_signs(uint4& v, const uint4& s) {
  const uint32_t mask = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
  v.x ^= s.x & mask;
  v.y ^= s.y & mask;
  v.z ^= s.z & mask;
  v.w ^= s.w & mask;
}

// Rounds kCount neighbouring values and stores them.
template <int kCount, typename T>
__device__ __forceinline__ void store_values(T* y, const float* v) {
  if constexpr (kCount == 1) {
    *y = static_cast<T>(*v);
  } else {
    constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
    uint32_t u[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 2) {
        u[i] = Pair<T>::pack(v[2 * i], v[2 * i + 1]);
      } else {
        u[i] = __float_as_uint(v[i]);
      }
    }
    if constexpr (kWords == 4) {
      *reinterpret_cast<uint4*>(y) = make_uint4(u[0], u[1], u[2], u[3]);
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(y) = make_uint2(u[0], u[1]);
    } else {
      *reinterpret_cast<uint32_t*>(y) = u[0];
    }
  }
}

}  // namespace detail

// Steps 1 and 2: raw loads of one tile to fp32 values with all bits below L::kDone transformed, but for those
// of a trade.
// Tensor-core layout of values: register bits, from the lowest, are index bits 5, 0, 2, kLineBit...; lanes
// are kLaneBit, kLaneBit + 1, 1, 3, 4. Otherwise both are in the order of the loads.
template <typename L>
__device__ __forceinline__ void transform_tile(const uint4 (&raw)[L::kParts][L::kLoads],
                                               const uint32_t (&a)[4], float (&v)[L::kValues],
                                               bool difference, int log_block) {
  using T = typename L::T;
  const uint32_t minus = sizeof(T) == 2 ? 0x80008000u : 0x80000000u;
  const uint32_t flip = L::kParts > 1 && difference ? minus : 0;  // of the second part
  if constexpr (L::kTensor) {
    const auto product = [&](float* d, const uint2& x0, const uint2& x1, const float4& c) {
      detail::Pair<T>::mma(d, a, x0, c);
      if constexpr (L::kParts > 1 || L::kTopFirst)
        detail::Pair<T>::mma(d, a, x1, make_float4(d[0], d[1], d[2], d[3]));
    };
    // Eight values of load j, of a block of two parts or halves with the second one's signs in `change`.
    const auto products = [&](float* d, const uint4& x0, const uint4& second, uint32_t change) {
      const uint4 x1 = make_uint4(second.x ^ change, second.y ^ change, second.z ^ change, second.w ^ change);
      const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if constexpr (L::kFiveBits) {
        float s[4];
        product(s, make_uint2(x0.x, x0.y), make_uint2(x1.x, x1.y), zero);
        const float4 sum = make_float4(s[0], s[1], s[2], s[3]);
        product(d, make_uint2(x0.z, x0.w), make_uint2(x1.z, x1.w), sum);
        product(d + 4, make_uint2(x0.z ^ minus, x0.w ^ minus), make_uint2(x1.z ^ minus, x1.w ^ minus), sum);
      } else {
        product(d, make_uint2(x0.x, x0.y), make_uint2(x1.x, x1.y), zero);
        product(d + 4, make_uint2(x0.z, x0.w), make_uint2(x1.z, x1.w), zero);
      }
    };
#pragma unroll
    for (int j = 0; j < 1 << L::kLogLines; ++j) {
      if constexpr (L::kTopFirst) {
        constexpr int kHalf = L::kLoads / 2;
        products(v + 8 * j, raw[0][j], raw[0][j + kHalf], 0);
        products(v + 8 * (j + kHalf), raw[0][j], raw[0][j + kHalf], minus);
      } else {
        products(v + 8 * j, raw[0][j], raw[L::kParts - 1][j], flip);
      }
    }
    if constexpr (!L::kFiveBits) detail::butterfly_registers<2>(v);
    if constexpr (L::kLogN > 5) detail::butterfly_registers<0>(v);
  } else {
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      const uint32_t u[4] = {raw[0][j].x, raw[0][j].y, raw[0][j].z, raw[0][j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
          const float2 f = detail::Pair<T>::unpack(u[i]);
          v[8 * j + 2 * i] = f.x;
          v[8 * j + 2 * i + 1] = f.y;
        } else {
          v[4 * j + i] = __uint_as_float(u[i]);
        }
      }
      if constexpr (L::kParts > 1) {
        static_assert(L::kParts == 1 || sizeof(T) == 4, "16-bit blocks of two parts use the tensor cores");
        v[4 * j] += __uint_as_float(raw[1][j].x ^ flip);
        v[4 * j + 1] += __uint_as_float(raw[1][j].y ^ flip);
        v[4 * j + 2] += __uint_as_float(raw[1][j].z ^ flip);
        v[4 * j + 3] += __uint_as_float(raw[1][j].w ^ flip);
      }
    }
    const int bits = L::kSmall ? log_block : L::kLogN;
    if (bits > 0) detail::butterfly_registers<0>(v);
    if (bits > 1) detail::butterfly_registers<1>(v);
    if constexpr (L::kVectorBits == 3) {
      if (bits > 2) detail::butterfly_registers<2>(v);
    }
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (!L::kTrade && bits > L::kVectorBits + b) detail::butterfly_lanes(v, 1 << b);
    }
  }
  constexpr int kFirst = L::kTensor ? 3 : L::kVectorBits;
  if constexpr (L::kLogLines > 0 && L::kLogN > L::kLineBit) detail::butterfly_registers<kFirst>(v);
  if constexpr (L::kLogLines > 1 && L::kLogN > L::kLineBit + 1) detail::butterfly_registers<kFirst + 1>(v);
  if constexpr (L::kLogLines > 2 && L::kLogN > L::kLineBit + 2) detail::butterfly_registers<kFirst + 2>(v);
  if constexpr (L::kLogLines > 3 && L::kLogN > L::kLineBit + 3) detail::butterfly_registers<kFirst + 3>(v);
  if constexpr (L::kTrade) return;
  // The products have moved index bits kLaneBit and kLaneBit + 1 to lanes 0 and 1.
  if constexpr (L::kShuffled > 0 && L::kLogN > L::kLaneBit) detail::butterfly_lanes(v, L::kTensor ? 1 : 8);
  if constexpr (L::kShuffled > 1 && L::kLogN > L::kLaneBit + 1)
    detail::butterfly_lanes(v, L::kTensor ? 2 : 16);
}

namespace detail {

// The rest of step 1 for layouts with kTrade. A warp's values lie in shared memory in the order of L::word,
// since a barrier of the warp; a lane takes those of index bits 2 to 4, kLaneBit and kLaneBit + 1, does their
// butterflies and puts them back. Its own index bits are 0 and 1 and those of the loads: `tile` is where they
// lead to in the warp's tile, and `swizzle` what the latter add to bank bits 2 to 4. kStep: words from one
// kLaneBit to the next.
template <int kStep>
__device__ __forceinline__ void trade_in_warp(float (&v)[32], float* tile, int swizzle) {
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = tile[((i & 7) << 2 ^ swizzle) + (i >> 3) * kStep];
  butterfly_registers<0>(v);
  butterfly_registers<1>(v);
  butterfly_registers<2>(v);
  butterfly_registers<3>(v);
  butterfly_registers<4>(v);
#pragma unroll
  for (int i = 0; i < 32; ++i) tile[((i & 7) << 2 ^ swizzle) + (i >> 3) * kStep] = v[i];
}

}  // namespace detail

// Step 4 for blocks within one warp: v, scaled and in the layout of transform_tile, to 16-byte vectors.
template <typename L>
__device__ __forceinline__ void pack_tile(const float (&v)[L::kValues], uint4 (&out)[L::kLoads]) {
  using T = typename L::T;
  const bool upper = threadIdx.x & 4;
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    uint32_t u[4];
    if constexpr (L::kTensor) {
      // Bit 1 is in lane 2 and bit 5 in a register: trade them, so that a lane has bits 0, 1 and 2.
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float* d = v + 8 * j + 4 * m;
        const uint32_t p0 = detail::Pair<T>::pack(d[0], d[2]);
        const uint32_t p1 = detail::Pair<T>::pack(d[1], d[3]);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? p0 : p1, 4);
        u[2 * m] = upper ? other : p0;
        u[2 * m + 1] = upper ? p1 : other;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
          u[i] = detail::Pair<T>::pack(v[8 * j + 2 * i], v[8 * j + 2 * i + 1]);
        } else {
          u[i] = __float_as_uint(v[4 * j + i]);
        }
      }
    }
    out[j] = make_uint4(u[0], u[1], u[2], u[3]);
  }
}

}  // namespace halo_train
