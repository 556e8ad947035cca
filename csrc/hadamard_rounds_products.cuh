// Two rounds by tensor cores: blocks of 2^kLogN 16-bit values, of which a warp has 2^(kLogValues + 5).
//
// Index bits of a block, from the lowest: 16-byte vector (0..2) | lanes (3..7) | registers (8...) | warps.
// Eight values of each lane, 256 neighbours, are a tile X of 16 x 16, with index bits 0, 3, 4, 1 along one
// side and 5, 6, 7, 2 along the other. A product with the +-1 matrix H of order 16 does one side, H X^T, and
// leaves it where the next product wants its second operand, so that two give H X H and eight neighbours to a
// lane again. The other bits are register bits, or the warps', which trade places with register bits through
// shared memory.
//
// The first product of a value is exact: it takes raw input. Later ones take fp32 sums in two fp16 terms,
// v = first + second to 2^-22 of v, or in three; each is rounded from what is left of v, v - first I, which
// is a product as well. fp16 has a range: a block is multiplied by the power of two that keeps its sums below
// 2^16 whatever the input, and the matrix of the later products is H / 4, which is orthonormal. An infinity
// makes its block NaN.

#pragma once

#include <type_traits>

#include "hadamard_rounds.cuh"
#include "shared_address.cuh"

namespace halo_train {

// kFiveBits: the first product does a register bit as well.
template <typename T_, int kLogN_, int kLogValues_, bool kFiveBits_ = false>
struct ProductsLayout {
  using T = T_;
  static constexpr int kLogN = kLogN_;
  static constexpr int kLogValues = kLogValues_;
  static constexpr int kValues = 1 << kLogValues;
  static constexpr int kTiles = kValues / 8;
  static constexpr int kLogWarps = kLogN - kLogValues - 5;
  static constexpr int kWarps = 1 << kLogWarps;
  static constexpr bool kTrade = kLogWarps > 0;
  static_assert(kLogValues > 3 && kLogWarps >= 0 && kLogWarps <= kLogValues - 3,
                "tiles, to trade as many as there are warps");
  static constexpr bool kFiveBits = kFiveBits_;

  // Register bits that choose a tile. The highest is done last, with a factor; from it down they are traded.
  static constexpr uint32_t kLines = (1u << kLogValues) - 8, kTop = 1u << (kLogValues - 1);
  static constexpr int kKept = kLogValues - 3 - kLogWarps;  // of them, the lowest, that are not traded
  static constexpr uint32_t kTraded = kLines & ~((8u << kKept) - 1);

  // What a lane gives to that lane of another warp, in units of 16 bytes.
  static constexpr int kUnits = kValues / 4 / kWarps;
  static constexpr size_t kSharedBytes = kTrade ? (sizeof(float) << kLogN) + sizeof(uint32_t) * kWarps : 0;

  // log2 of a bound of the sums that are split into terms, over that of the input, less one. A sum is at most
  // n / 4 inputs after the first round; 2^i register bits after the product that begins the second make up to
  // 2^(i / 2) of that, where the signs between are made for it.
  static constexpr int kGrowth = kLogN - 2 + (kTrade ? kLogValues - 5 : 0);

  // float16 in large blocks: with two terms in each product, and sums of all terms by tensor cores, which cut
  // off instead of rounding, more than 1e-3 of the results would not be correctly rounded. In the products
  // that begin and end the second round it takes the least to change that.
  static constexpr bool kHalf = std::is_same<T, __half>::value;
  static constexpr int kBeginTerms = kHalf && kLogN > 13 ? 3 : 2, kEndTerms = kHalf && kLogN > 14 ? 3 : 2;
  static constexpr bool kBeginAdds = kHalf && kLogN > 14, kEndAdds = kHalf && kLogN > 13;
};

namespace detail {

using Terms16 = Pair<__half>;
constexpr uint32_t kMinus = 0x80008000u;

// Signs of the Sylvester matrix of order 16 as a first operand.
__device__ __forceinline__ void sylvester_signs(uint32_t (&a)[4]) {
  const int lane = threadIdx.x & 31;
  a[0] = (__popc(lane >> 3 & lane & 3) & 1 ? kMinus : 0u) ^ (lane & 4 ? 0x80000000u : 0u);
  // Equal, but not to the compiler: registers that it knows to be equal it copies for each product.
  a[1] = __shfl_sync(0xffffffffu, a[0], lane);
  a[2] = __shfl_xor_sync(0xffffffffu, a[0], 0);
  a[3] = a[0] ^ kMinus;
}

// -1 on the diagonal, of order 8, as a second operand.
__device__ __forceinline__ uint32_t minus_identity() {
  const int lane = threadIdx.x & 31;
  return lane >> 3 != (lane & 3) ? 0u : lane & 4 ? 0xbc000000u : 0x0000bc00u;
}

// Eight values of a tile, as a product leaves them, in terms, the largest first.
template <int kTerms>
struct TileTerms {
  uint32_t term[kTerms][4];

  // kAcross: registers 0, 1, 4, 5 and 2, 3, 6, 7 make the operands of a product, else 0 to 3 and 4 to 7.
  // Registers of an operand are neighbours: values that come from additions may lie so that terms already are
  // the pairs of multiply_terms(), those that come from a product lie as it left them.
  template <bool kAcross>
  __device__ __forceinline__ void split(const float* v, uint32_t minus) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int p = kAcross ? i : 2 * i, q = kAcross ? i + 2 : 2 * i + 1;
      float rest[4] = {v[2 * p], v[2 * p + 1], v[2 * q], v[2 * q + 1]};
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        term[k][p] = Terms16::pack(rest[0], rest[1]), term[k][q] = Terms16::pack(rest[2], rest[3]);
        if (k == kTerms - 1) break;
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(rest[0]), "+f"(rest[1]), "+f"(rest[2]), "+f"(rest[3])
            : "r"(term[k][p]), "r"(term[k][q]), "r"(minus));
      }
    }
  }
  // By the signs of masks, the other bits of which may be anything.
  __device__ __forceinline__ void flip(const uint32_t (&mask)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        // x ^ (mask & signs) in one operation; the compiler would take what is common out of several.
        asm("lop3.b32 %0, %0, %1, %2, 0x78;" : "+r"(term[k][i]) : "r"(mask[i]), "n"(kMinus));
      }
    }
  }
};

// v = H X^T of a tile. For bfloat16 the first terms go first: they need not wait for the others (2048: 5%
// faster), but the tensor cores cut off bits of the whole sum once more, for which float16 has no room.
// kAdds: the sums of the first terms, which are all but exact, are added to those of the others, which rounds
// once.
template <typename T, bool kAdds, int kTerms>
__device__ __forceinline__ void multiply_terms(float* v, const TileTerms<kTerms>& x, const uint32_t (&a)[4]) {
  constexpr bool kFirst = std::is_same<T, __nv_bfloat16>::value;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 sum = zero;
    float d[4];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      const int i = kFirst ? k : kTerms - 1 - k;
      const bool adds = kAdds && i == 0;
      Terms16::mma(d, a, make_uint2(x.term[i][half], x.term[i][half + 2]), adds ? zero : sum);
      sum = adds ? make_float4(sum.x + d[0], sum.y + d[1], sum.z + d[2], sum.w + d[3])
                 : make_float4(d[0], d[1], d[2], d[3]);
    }
    float* const to = v + 4 * half;
    to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
  }
}

// The largest of 16-bit magnitudes, as bits, over a warp; a NaN is larger than infinity.
template <int kCount>
__device__ __forceinline__ uint32_t largest_magnitude(const uint4 (&v)[kCount]) {
  uint32_t positive = 0, negative = 0;  // the largest as numbers with and without sign
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    positive = __vimax3_s16x2(positive, v[j].x, v[j].y);
    negative = __vimax3_u16x2(negative, v[j].x, v[j].y);
    positive = __vimax3_s16x2(positive, v[j].z, v[j].w);
    negative = __vimax3_u16x2(negative, v[j].z, v[j].w);
  }
  const uint32_t most = __vmaxu2(positive, negative & ~kMinus);
  return __reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16));
}

// log2 of what a block with this largest magnitude is multiplied by. Its inverse and, as a factor of 16 bits,
// it have to be normal; smaller magnitudes have so few bits that sums are exact.
template <typename T, int kGrowth>
__device__ __forceinline__ int block_exponent(uint32_t magnitude) {
  constexpr bool kWide = std::is_same<T, __nv_bfloat16>::value;
  const int exponent =
      kWide ? static_cast<int>(magnitude >> 7) - 127 : static_cast<int>(magnitude >> 10) - 15;
  return min(14 - kGrowth - exponent, kWide ? 126 : 15);
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// Masks for a lane's terms between the rounds. Register bits there: 0 is index bit 0, 1 index bit 2, 2 index
// bit 1; traded ones are the warps', and the warps' those.
template <typename L>
__device__ __forceinline__ void middle_masks(const uint8_t* bytes, int warp, int tile, uint32_t (&mask)[4]) {
  const int low = tile & ((1 << L::kKept) - 1), high = tile >> L::kKept;
  const int traded = L::kTrade ? warp << (5 + L::kKept) | high << (L::kLogValues + 2) : 0;
  const uint32_t byte = __ldg(bytes + ((L::kTrade ? low : tile) << 5 | traded));
  mask[0] = byte * (1u << 15 | 1u << 30), mask[1] = byte * (1u << 11 | 1u << 26);
  mask[2] = byte * (1u << 13 | 1u << 28), mask[3] = byte * (1u << 9 | 1u << 24);
}

// Values between a lane and the same lane of each warp, whose units are `step` apart.
template <typename L>
__device__ __forceinline__ void write_units(float4* units, int step, const float (&v)[L::kValues]) {
#pragma unroll
  for (int warp = 0; warp < L::kWarps; ++warp) {
#pragma unroll
    for (int u = 0; u < L::kUnits; ++u) {
      const float* f = v + (deposit<L::kTraded>(warp) | u << 2);
      units[warp * step + u * 32] = make_float4(f[0], f[1], f[2], f[3]);
    }
  }
}

template <typename L>
__device__ __forceinline__ void read_units(float (&v)[L::kValues], const float4* units, int step) {
#pragma unroll
  for (int warp = 0; warp < L::kWarps; ++warp) {
#pragma unroll
    for (int u = 0; u < L::kUnits; ++u) {
      float* const to = v + (deposit<L::kTraded>(warp) | u << 2);
      const float4 f = units[warp * step + u * 32];
      to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
    }
  }
}

}  // namespace detail

// Both rounds of a block from its raw values, which begin at column `here` of a row; `in`: index of the
// lane's first value. between() is called when all warps have read their raw values.
template <typename L, typename Between>
__device__ __forceinline__ void rounds_of_block(const RoundsParams<typename L::T>& p, int64_t row,
                                                uint32_t here, int in, uint4 (&raw)[L::kTiles],
                                                float4* shared_units, const Between& between) {
  using T = typename L::T;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  if (p.first != nullptr) detail::flip_vectors<T, 8>(raw, p.first, here + in);
  const uint8_t* const middle = p.middle + ((here >> 3) + lane);
  uint32_t plus[4];
  detail::sylvester_signs(plus);
  const uint32_t minus = detail::minus_identity();

  // 1. The first product, and the register bits. Where a warp has the whole block, the power of two is in
  // the matrix; else it comes with the last butterfly on what other warps had.
  uint32_t largest = detail::largest_magnitude(raw);
  int exponent = L::kTrade ? 0 : detail::block_exponent<T, L::kGrowth>(largest);
  const uint32_t one = detail::Pair<T>::kOne + (exponent << (std::is_same<T, __half>::value ? 10 : 7));
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = plus[i] ^ (one | one << 16);
  float v[L::kValues];
  constexpr float4 kZero = {0.0f, 0.0f, 0.0f, 0.0f};
  if constexpr (L::kFiveBits) {
    uint32_t b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = a[i] ^ detail::kMinus;
    const auto products = [&](float* sum, float* difference, uint32_t x0, uint32_t x1, uint32_t y0,
                              uint32_t y1) {
      float d[4];
      detail::Pair<T>::mma(d, a, make_uint2(x0, x1), kZero);
      const float4 c = make_float4(d[0], d[1], d[2], d[3]);
      detail::Pair<T>::mma(sum, a, make_uint2(y0, y1), c);
      detail::Pair<T>::mma(difference, b, make_uint2(y0, y1), c);
    };
#pragma unroll
    for (int j = 0; j < L::kTiles; j += 2) {
      float* const to = v + 8 * j;
      products(to, to + 8, raw[j].x, raw[j].y, raw[j + 1].x, raw[j + 1].y);
      products(to + 4, to + 12, raw[j].z, raw[j].w, raw[j + 1].z, raw[j + 1].w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < L::kTiles; ++j) {
      detail::Pair<T>::mma(v + 8 * j, a, make_uint2(raw[j].x, raw[j].y), kZero);
      detail::Pair<T>::mma(v + 8 * j + 4, a, make_uint2(raw[j].z, raw[j].w), kZero);
    }
  }
  detail::butterfly_mask<L::kLines & ~(L::kFiveBits ? 8u : 0u)>(v);

  // 2. The warps' bits. A thread writes where it will read what comes back, so that a barrier after each
  // write is enough.
  uint32_t* const magnitudes = reinterpret_cast<uint32_t*>(shared_units + (1 << (L::kLogN - 2)));
  float4* const own = shared_units + warp * (L::kWarps * L::kUnits * 32) + lane;
  float4* const others = shared_units + warp * (L::kUnits * 32) + lane;
  constexpr int kOwn = L::kUnits * 32, kOther = L::kWarps * kOwn;  // from warp to warp
  if constexpr (L::kTrade) {
    detail::write_units<L>(others, kOther, v);
    if (lane == 0) magnitudes[warp] = largest;
    __syncthreads();
    between();
    detail::read_units<L>(v, own, kOwn);
    largest = __reduce_max_sync(0xffffffffu, magnitudes[lane % L::kWarps]);
    exponent = detail::block_exponent<T, L::kGrowth>(largest);
    detail::butterfly_mask<L::kTraded & ~L::kTop>(v);
    detail::butterfly_registers_scaled<L::kLogValues - 1>(v, detail::power_of_two(exponent));
  }

  // 3. The end of the first round, signs, and the second round.
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = plus[i] ^ 0x34003400u;  // 1/4
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) {
    detail::TileTerms<2> terms;
    terms.template split<true>(v + 8 * j, minus);
    detail::multiply_terms<T, false>(v + 8 * j, terms, a);
  }
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) {
    detail::TileTerms<L::kBeginTerms> terms;
    terms.template split<false>(v + 8 * j, minus);
    uint32_t mask[4];
    detail::middle_masks<L>(middle, warp, j, mask);
    terms.flip(mask);
    detail::multiply_terms<T, L::kBeginAdds>(v + 8 * j, terms, a);
  }
  detail::butterfly_mask<L::kLines & ~(L::kTrade ? 0 : L::kTop)>(v);
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) {
    detail::TileTerms<L::kEndTerms> terms;
    terms.template split<true>(v + 8 * j, minus);
    detail::multiply_terms<T, L::kEndAdds>(v + 8 * j, terms, a);
  }
  if constexpr (L::kTrade) {
    detail::write_units<L>(own, kOwn, v);
    __syncthreads();
    detail::read_units<L>(v, others, kOther);
    detail::butterfly_mask<L::kTraded & ~L::kTop>(v);
  }
  // Three orthonormal products are 2^6 too small.
  const float scale = static_cast<float>(64 * p.scale) * detail::power_of_two(-exponent);
  detail::butterfly_registers_scaled<L::kLogValues - 1>(v, scale);

  T* const y = p.y + row * (int64_t{p.axis} << 3) + here + in;
  uint4 out[L::kTiles];
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) {
    using P = detail::Pair<T>;
    const float* d = v + 8 * j;  // register bits 1 and 2 are index bits 2 and 1
    out[j] = make_uint4(P::pack(d[0], d[1]), P::pack(d[4], d[5]), P::pack(d[2], d[3]), P::pack(d[6], d[7]));
  }
  if (p.last != nullptr) detail::flip_vectors<T, 8>(out, p.last, here + in);
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) *reinterpret_cast<uint4*>(y + (j << 8)) = out[j];
}

// A thread block for a block of a row. `ahead`: by how many rows the L2 cache runs ahead of the loads.
template <typename L, int kMinBlocks>
__global__ void __launch_bounds__(32 * L::kWarps, kMinBlocks)
    hadamard_rounds_products(const RoundsParams<typename L::T> p, const int64_t rows, const int64_t ahead) {
  using T = typename L::T;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const uint32_t columns = p.axis >> (L::kLogN - 3);  // blocks in a row
  int64_t row = blockIdx.x;
  uint32_t here = 0;  // column of the block
  if (columns > 1) {
    detail::locate(row, columns, row, here);
    here <<= L::kLogN;
  }
  const int in = lane << 3 | warp << (L::kLogValues + 5);
  const T* const x = p.x + row * p.row_stride + here + in;
  uint4 raw[L::kTiles];
#pragma unroll
  for (int j = 0; j < L::kTiles; ++j) raw[j] = detail::load16(x + (j << 8));
#if __CUDA_ARCH__ >= 900
  if (ahead > 0 && threadIdx.x == 0 && row + ahead < rows) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(x + ahead * p.row_stride),
                 "n"(sizeof(T) << L::kLogN)
                 : "memory");
  }
#endif
  extern __shared__ float4 shared_units[];
  rounds_of_block<L>(p, row, here, in, raw, shared_units, [] {});
}

// Thread blocks that stay: where only one fits a multiprocessor, nothing else would compute while it loads.
// The next block of a row waits in shared memory.
template <typename L>
__global__ void __launch_bounds__(32 * L::kWarps, 1)
    hadamard_rounds_staying(const RoundsParams<typename L::T> p) {
  using T = typename L::T;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int in = lane << 3 | warp << (L::kLogValues + 5);
  extern __shared__ float4 shared_units[];
  const auto locate = [&](uint32_t block, uint32_t& column) {
    const uint32_t columns = p.axis >> (L::kLogN - 3);  // blocks in a row
    column = block % columns << L::kLogN;
    return block / columns;
  };
  const uint32_t blocks = static_cast<uint32_t>(p.total >> L::kLogN);
#if __CUDA_ARCH__ >= 900
  uint4* const buffer = reinterpret_cast<uint4*>(shared_units) + L::kSharedBytes / 16;
  const uint32_t arrived = detail::shared_address(buffer + (1 << (L::kLogN - 3)));
  const auto fetch = [&](uint32_t block) {
    uint32_t column;
    const int64_t row = locate(block, column);
    constexpr uint32_t kBytes = sizeof(T) << L::kLogN;
    detail::expect(arrived, kBytes);
    detail::copy_to_shared(detail::shared_address(buffer), p.x + row * p.row_stride + column, kBytes,
                           arrived);
  };
  if (threadIdx.x == 0) {
    detail::init_barrier(arrived, 1);
    detail::show_barriers();
    fetch(blockIdx.x);
  }
  __syncthreads();
  uint32_t phase = 0;
#endif
  for (uint32_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    uint32_t here;
    const int64_t row = locate(block, here);
    uint4 raw[L::kTiles];
#if __CUDA_ARCH__ >= 900
    detail::wait_for_phase(arrived, phase);
    phase ^= 1;
#pragma unroll
    for (int j = 0; j < L::kTiles; ++j) raw[j] = buffer[(in >> 3) + (j << 5)];
    rounds_of_block<L>(p, row, here, in, raw, shared_units, [&] {
      if (threadIdx.x == 0 && block + gridDim.x < blocks) fetch(block + gridDim.x);
    });
#else
#pragma unroll
    for (int j = 0; j < L::kTiles; ++j) {
      raw[j] = detail::load16(p.x + row * p.row_stride + here + in + (j << 8));
    }
    rounds_of_block<L>(p, row, here, in, raw, shared_units, [] {});
#endif
  }
}

}  // namespace halo_train
