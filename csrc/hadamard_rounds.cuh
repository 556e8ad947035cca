// Two Hadamard transforms with random signs in one pass: y = scale * (x diag(first)) (I kron H) diag(middle)
// (I kron H) diag(last), n = 2^kLogN. Values stay in fp32 between the rounds, so there is one rounding.
//
// The bits of an index go through three places (see hadamard_tile.cuh for the first):
//
// 1. Loads. transform_tile does the bits below kDone of the first round.
// 2. Middle. Registers hold the bits that are left, with which the first round ends, and as many as fit of
//    those that the stores have in lanes. The second round does all of them.
// 3. Stores, placed as the loads. The second round does the rest: register bits, and by shuffles what step 2
//    had no room for.
//
// Between them are exchanges through shared memory in fp32. A thread writes the second one where it has read
// the first one, so that a barrier after each write is enough.

#pragma once

#include "hadamard_kernel.cuh"

namespace halo_train {

template <typename T>
struct RoundsParams {
  const T* x;
  T* y;                   // contiguous
  const uint8_t* first;   // a bit for each position, set where the sign is minus; 8-byte aligned; or nullptr
  const uint8_t* middle;  // likewise, never nullptr
  const uint8_t* last;    // likewise
  int64_t total;          // elements
  int64_t row_stride;     // elements between rows of x
  uint32_t axis;          // 16-byte vectors in a row, a multiple of the block
  bool split;             // rows are not single blocks without gaps
  double scale;           // of a float the compiler would load the constant again for each multiplication
};

namespace detail {

__host__ __device__ constexpr int count_bits(uint32_t mask) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) ++count;
  return count;
}

// The lowest bits of v, one to each set bit of the mask.
template <uint32_t kMask>
__device__ __forceinline__ constexpr int deposit(int v) {
  if constexpr (kMask == 0) {
    return 0;
  } else {
    constexpr uint32_t kLow = kMask & ~(kMask - 1);     // lowest set bit
    constexpr uint32_t kRun = kMask & ~(kMask + kLow);  // and its neighbours
    constexpr int kShift = count_bits(kLow - 1);
    return ((v & static_cast<int>(kRun >> kShift)) << kShift) | deposit<kMask & ~kRun>(v >> count_bits(kRun));
  }
}

// Flips the signs of a 16-byte vector by the lowest bits of `bits`, one for each element.
template <typename T>
__device__ __forceinline__ void flip_bits(uint4& v, uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    v.x ^= bits * (1u << 15 | 1u << 30) & 0x80008000u;
    v.y ^= bits * (1u << 13 | 1u << 28) & 0x80008000u;
    v.z ^= bits * (1u << 11 | 1u << 26) & 0x80008000u;
    v.w ^= bits * (1u << 9 | 1u << 24) & 0x80008000u;
  } else {
    v.x ^= bits << 31;
    v.y ^= bits << 30 & 0x80000000u;
    v.z ^= bits << 29 & 0x80000000u;
    v.w ^= bits << 28 & 0x80000000u;
  }
}

// Flips vectors of T that are 2^kLogStep elements apart, the first of which has the given index.
template <typename T, int kLogStep, int kCount>
__device__ __forceinline__ void flip_vectors(uint4 (&v)[kCount], const uint8_t* bits, uint32_t index) {
  const uint8_t* const start = bits + (index >> 3);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const uint32_t byte = __ldg(start + (j << (kLogStep - 3)));
    flip_bits<T>(v[j], sizeof(T) == 2 ? byte : byte >> (index & 4));
  }
}

__device__ __forceinline__ float flip_sign(float v, uint32_t bits, int bit) {
  return __uint_as_float(__float_as_uint(v) ^ (bits << (31 - bit) & 0x80000000u));
}

// Butterflies on the register bits of a mask.
template <uint32_t kMask, int kValues>
__device__ __forceinline__ void butterfly_mask(float (&v)[kValues]) {
  if constexpr (kMask != 0) {
    butterfly_registers<count_bits((kMask & ~(kMask - 1)) - 1)>(v);
    butterfly_mask<kMask&(kMask - 1)>(v);
  }
}

}  // namespace detail

// Where the bits of an index are in the three steps, and in shared memory between them.
template <typename T_, int kLogN_, int kLogValues_, int kShuffled_ = 0, bool kFiveBits_ = false>
struct RoundsLayout {
  using T = T_;
  using L = HadamardLayout<T_, kLogN_, kLogValues_, kShuffled_, kFiveBits_>;
  static constexpr int kLogN = kLogN_;
  static constexpr int kValues = L::kValues;
  static_assert(L::kExchange, "smaller blocks stay in a warp");

  // Index bits in the registers of a thread at the stores (and, but for the products, at the loads).
  static constexpr uint32_t kStored = (L::kVector - 1) | (L::kLoads - 1) << L::kLineBit;

  static constexpr uint32_t middle() {
    uint32_t mask = (1u << kLogN) - (1u << L::kDone);
    const auto add = [&](int bit) {
      if (detail::count_bits(mask) < kLogValues_ && bit < kLogN) mask |= 1u << bit;
    };
    add(L::kLaneBit + 1);
    add(L::kLaneBit);
    for (int i = 2; i >= 0; --i) add(L::kVectorBits + i);
    for (int i = 0; i < L::kVectorBits; ++i) add(i);  // makes accesses wider
    return mask;
  }
  static constexpr uint32_t kMiddle = middle();  // index bits in registers in step 2, in ascending order
  static constexpr uint32_t kThreadMiddle = (1u << kLogN) - 1 - kMiddle;
  static_assert(detail::count_bits(kMiddle) == kLogValues_, "bits that fill the registers");
  static constexpr uint32_t kLeft = (1u << kLogN) - 1 - (kMiddle | kStored);  // for shuffles in step 3
  static constexpr int kWide = (kMiddle & 3) == 3 ? 4 : (kMiddle & 1) + 1;    // words of an access in step 2

  // Register bits of what is done where.
  static constexpr uint32_t kLastOfFirst =
      ((1u << kLogValues_) - 1) & ~((1u << detail::count_bits(kMiddle & ((1u << L::kDone) - 1))) - 1);
  static constexpr uint32_t kLastOfSecond =
      (kStored & ~kMiddle & (L::kVector - 1)) | (kStored & ~kMiddle) >> L::kLineBit << L::kVectorBits;
  static_assert(kLastOfSecond >> (kLogValues_ - 1) == 1,
                "the top register bit is left for the last butterfly");

  // Distance in words between indices that differ in a bit: their natural one, plus what makes the lanes of
  // an access go to different banks.
  static __host__ __device__ constexpr int residue(int bit) {
    if (L::kTensor && (bit == 5 || bit == L::kLaneBit)) return 4;
    if (L::kTensor && bit == L::kLaneBit + 1) return 16;
    // Lanes of step 2 (of one phase of a wide access) whose bits are no bank bits take the banks that are
    // free.
    int lanes = kWide == 1 ? 5 : kWide == 2 ? 4 : 3;
    uint32_t banks = 31 & ~static_cast<uint32_t>(kWide - 1);
    int seen = 0;
    for (int b = 0; b < 5; ++b) {
      if (kThreadMiddle >> b & 1 && seen < lanes) banks &= ~(1u << b), ++seen;
    }
    for (int b = 5; b < kLogN && seen < lanes; ++b) {
      if (!(kThreadMiddle >> b & 1)) continue;
      const uint32_t bank = banks & ~(banks - 1);
      if (b == bit) return static_cast<int>(bank);
      banks &= ~bank, ++seen;
    }
    return -1;
  }
  static __host__ __device__ constexpr int stride(int bit) {
    int used = 1;  // words below
    int last = 0;
    for (int b = 0;; ++b) {
      // Twice the last one where that will do: then a field of bits takes one multiplication.
      const bool any = b < 5 || residue(b) < 0;
      int s = any ? (b < 2 ? used : (used + 3) / 4 * 4) : (used - residue(b) + 31) / 32 * 32 + residue(b);
      if (2 * last >= used && 2 * last <= s + s / 8 && (any || 2 * last % 32 == residue(b))) s = 2 * last;
      if (b == bit) return s;
      used += s;
      last = s;
    }
  }
  template <uint32_t kMask>
  static __device__ __forceinline__ constexpr int words(int index) {
    if constexpr (kMask == 0) {
      return 0;
    } else {
      constexpr int kBit = detail::count_bits((kMask & ~(kMask - 1)) - 1);
      constexpr int kStride = stride(kBit);
      constexpr int kLength = doubling(kMask, kBit);
      constexpr uint32_t kField = (1u << kLength) - 1;
      return (index >> kBit & static_cast<int>(kField)) * kStride + words<kMask & ~(kField << kBit)>(index);
    }
  }
  // Bits of the mask from `bit` on whose distances double.
  static __host__ __device__ constexpr int doubling(uint32_t mask, int bit) {
    int length = 1;
    while (mask >> (bit + length) & 1 && stride(bit + length) == 2 * stride(bit + length - 1)) ++length;
    return length;
  }
  // Word of an index whose bits all lie in a mask.
  template <uint32_t kMask = (1u << kLogN) - 1>
  static __device__ __forceinline__ constexpr int word(int index) {
    return words<kMask>(index);
  }
  static constexpr int kWords = (stride(kLogN) + 3) / 4 * 4;
};

// kGroups blocks side by side in a thread block. `ahead`: by how many blocks the L2 cache runs ahead of the
// loads.
template <typename R, int kGroups, int kMinBlocks>
__global__ void __launch_bounds__(32 * R::L::kWarps * kGroups, kMinBlocks)
    hadamard_rounds(const RoundsParams<typename R::T> p, const int64_t ahead) {
  using L = typename R::L;
  using T = typename R::T;
  constexpr int kThreads = 32 * L::kWarps;
  extern __shared__ float shared_memory[];
  const int group = kGroups == 1 ? 0 : threadIdx.x / kThreads;
  const int thread = kGroups == 1 ? threadIdx.x : threadIdx.x % kThreads;
  const int lane = thread & 31;
  const int warp = thread / 32;
  float* const shared = shared_memory + group * R::kWords;

  const int64_t tasks = p.total >> L::kLogN;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kGroups + group;
  if (task >= tasks) return;

  const auto source = [&](int64_t index, uint32_t& column) {
    column = 0;
    if (!p.split) return p.x + (index << L::kLogN);
    int64_t row;
    detail::locate(index, p.axis >> (L::kLogN - L::kVectorBits), row, column);
    column <<= L::kLogN;
    return p.x + row * p.row_stride + column;
  };
  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit | warp << L::kWarpBit;
  const int between = detail::deposit<R::kThreadMiddle>(thread);
  constexpr uint32_t kThreadLoaded =
      (1u << L::kLogN) - 1 - (R::kStored & ~7u) - (1 << 0 | 1 << 2 | 1 << 5);  // of products
  constexpr uint32_t kThreadStored = (1u << L::kLogN) - 1 - R::kStored;
  uint32_t here;  // column of the block
  const T* const x = source(task, here) + in;
  uint4 raw[1][L::kLoads];
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) raw[0][j] = detail::load16(x + (j << L::kLineBit));
  const float scale = static_cast<float>(p.scale);
  uint32_t a[4] = {};
  if constexpr (L::kTensor) detail::sign_matrix<T>(a);

  if (p.first != nullptr) detail::flip_vectors<T, L::kLineBit>(raw[0], p.first, here + in);
  float v[L::kValues];
  transform_tile<L>(raw, a, v, false, 0);
#if __CUDA_ARCH__ >= 900
  if (ahead > 0 && thread == 0 && task + ahead < tasks) {
    uint32_t unused;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source(task + ahead, unused)),
                 "n"(sizeof(T) << L::kLogN)
                 : "memory");
  }
#endif

  if constexpr (L::kTensor) {
    float* const target =
        shared + R::template word<kThreadLoaded>((lane & 3) << L::kLaneBit | (lane >> 2 & 1) << 1 |
                                                 (lane >> 3) << 3 | warp << L::kWarpBit);
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) {
      if (i & 2) continue;
      const int word = R::word((i & 1) << 5 | (i >> 2 & 1) << 2 | i >> 3 << L::kLineBit);
      *reinterpret_cast<float2*>(target + word) = make_float2(v[i], v[i + 2]);
    }
  } else {
    float* const target = shared + R::template word<kThreadStored>(in);
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      *reinterpret_cast<float4*>(target + R::word(j << L::kLineBit)) =
          make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
    }
  }
  detail::group_barrier<kThreads, kGroups>(group);
  float* const own = shared + R::template word<R::kThreadMiddle>(between);
#pragma unroll
  for (int i = 0; i < L::kValues; i += R::kWide) {
    const float* from = own + R::word(detail::deposit<R::kMiddle>(i));
    if constexpr (R::kWide == 4) {
      const float4 f = *reinterpret_cast<const float4*>(from);
      v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
    } else if constexpr (R::kWide == 2) {
      const float2 f = *reinterpret_cast<const float2*>(from);
      v[i] = f.x, v[i + 1] = f.y;
    } else {
      v[i] = *from;
    }
  }
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(p.middle) + (here >> 5) + (between >> 5);
  constexpr uint32_t kAll = (1u << L::kLogValues) - 1;
  detail::butterfly_mask<R::kLastOfFirst>(v);
  constexpr int kIn = detail::count_bits(R::kMiddle & 31);  // register bits within a word
#pragma unroll
  for (int g = 0; g < L::kValues >> kIn; ++g) {
    const uint32_t bits = __ldg(words + (detail::deposit<R::kMiddle>(g << kIn) >> 5)) >> (between & 31);
#pragma unroll
    for (int i = 0; i < 1 << kIn; ++i) {
      float& value = v[g << kIn | i];
      value = detail::flip_sign(value, bits, detail::deposit<R::kMiddle & 31>(i));
    }
  }
  detail::butterfly_mask<kAll>(v);
#pragma unroll
  for (int i = 0; i < L::kValues; i += R::kWide) {
    float* to = own + R::word(detail::deposit<R::kMiddle>(i));
    if constexpr (R::kWide == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else if constexpr (R::kWide == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(v[i], v[i + 1]);
    } else {
      *to = v[i];
    }
  }
  detail::group_barrier<kThreads, kGroups>(group);
  const float* const mine = shared + R::template word<kThreadStored>(in);
#pragma unroll
  for (int i = 0; i < L::kValues; i += 4) {
    const float4 f = *reinterpret_cast<const float4*>(
        mine + R::word((i & (L::kVector - 1)) | i >> L::kVectorBits << L::kLineBit));
    v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
  }
#pragma unroll
  for (int b = 0; b < 5; ++b) {
    const int bit = b < 3 ? L::kVectorBits + b : L::kLaneBit + b - 3;
    if (R::kLeft >> bit & 1) detail::butterfly_lanes(v, 1 << b);
  }
  detail::butterfly_mask<R::kLastOfSecond & ~(1u << (L::kLogValues - 1))>(v);
  detail::butterfly_registers_scaled<L::kLogValues - 1>(v, scale);

  T* const y = p.y + (task << L::kLogN) + in;
  uint4 out[L::kLoads];
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j)
    detail::store_values<L::kVector>(reinterpret_cast<T*>(&out[j]), v + L::kVector * j);
  if (p.last != nullptr) detail::flip_vectors<T, L::kLineBit>(out, p.last, here + in);
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) *reinterpret_cast<uint4*>(y + (j << L::kLineBit)) = out[j];
}

// Blocks within one warp, one tile for a warp: both rounds in the layout of transform_tile, the second by
// shuffles where the first had products.
template <typename L, int kThreads>
__global__ void __launch_bounds__(kThreads) hadamard_rounds_warp(const RoundsParams<typename L::T> p) {
  static_assert(L::kLogN >= 6 && L::kLogN <= L::kWarpBit, "larger blocks take hadamard_rounds");
  using T = typename L::T;
  const int lane = threadIdx.x & 31;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t first = warp << L::kWarpBit;
  const float scale = static_cast<float>(p.scale);
  const auto column = [&](int64_t index) {
    if (!p.split) return static_cast<uint32_t>(index) & ((1u << L::kLogN) - 1);
    int64_t row;
    uint32_t vector;
    detail::locate(index >> L::kVectorBits, p.axis, row, vector);
    return vector << L::kVectorBits;
  };

  const auto flip = [](uint4& v, const uint8_t* bits, uint32_t index) {
    const uint32_t byte = __ldg(bits + (index >> 3));
    detail::flip_bits<T>(v, sizeof(T) == 2 ? byte : byte >> (index & 4));
  };

  // Index of the lane's first element in a tile, on the way in and on the way out.
  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit;
  const int out = L::kTensor ? (lane & 3) << L::kLaneBit | (lane >> 2 & 1) << 5 | (lane >> 3) << 3 : in;
  uint4 raw[1][L::kLoads];
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    const int64_t index = first + in + (j << L::kLineBit);
    raw[0][j] = make_uint4(0, 0, 0, 0);
    if (index >= p.total) continue;
    const T* x = p.x + index;
    if (p.split) {
      int64_t row;
      uint32_t vector;
      detail::locate(index >> L::kVectorBits, p.axis, row, vector);
      x = p.x + row * p.row_stride + (vector << L::kVectorBits);
    }
    raw[0][j] = detail::load16(x);
    if (p.first != nullptr) flip(raw[0][j], p.first, column(index));
  }
  uint32_t a[4] = {};
  if constexpr (L::kTensor) detail::sign_matrix<T>(a);
  float v[L::kValues];
  transform_tile<L>(raw, a, v, false, L::kLogN);

#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    if constexpr (L::kTensor) {
      const uint32_t start = column(first + ((lane & 3) << L::kLaneBit) + (j << L::kLineBit));
      const int within = (lane >> 2 & 1) << 1 | (lane >> 3) << 3;
      const uint2 word = __ldg(reinterpret_cast<const uint2*>(p.middle) + (start >> 6));
      const uint32_t bits[2] = {word.x >> within, word.y >> within};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[8 * j + i] = detail::flip_sign(v[8 * j + i], bits[i & 1], (i >> 1 & 1) | (i >> 2) << 2);
      }
    } else {
      const uint32_t index = column(first + in + (j << L::kLineBit));
      const uint32_t bits = __ldg(p.middle + (index >> 3)) >> (index & 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * j + i] = detail::flip_sign(v[4 * j + i], bits, i);
    }
  }
  // Registers hold the bits of a vector and of the loads (of products three others and those of the loads);
  // bits from kLaneBit on are in the last lanes (of products the first two).
  constexpr int kBits = L::kLogN < L::kLaneBit ? L::kLogN : L::kLaneBit;
  constexpr int kRegisters = kBits - 3;
  detail::butterfly_mask<(1u << kRegisters) - 1>(v);
#pragma unroll
  for (int b = 0; b < 3; ++b) detail::butterfly_lanes(v, L::kTensor ? 4 << b : 1 << b);
  if constexpr (L::kLogN > L::kLaneBit) detail::butterfly_lanes(v, L::kTensor ? 1 : 8);
  if constexpr (L::kLogN > L::kLaneBit + 1) detail::butterfly_lanes(v, L::kTensor ? 2 : 16);
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) v[i] *= scale;
  pack_tile<L>(v, raw[0]);
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    const int64_t index = first + out + (j << L::kLineBit);
    if (index >= p.total) continue;
    if (p.last != nullptr) flip(raw[0][j], p.last, column(index));
    *reinterpret_cast<uint4*>(p.y + index) = raw[0][j];
  }
}

}  // namespace halo_train
