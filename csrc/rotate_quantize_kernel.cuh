// Rotate and round in one pass: rows of (x diag(col_scale)) H in 8 bits, one scale a row, read once and
// written once. A row stays in the registers of one thread block from its load to its rounding, so its
// largest magnitude costs no second look at memory; the next row is loaded meanwhile.
//
// A warp holds a tile of 32 * kValues elements of a row. Each bit of their index is transformed where it
// happens to be (layouts: RotateLayout):
//
// 1. Tensor-core products with a constant +-1 matrix do bits 0, 1, 4, 5 and 6, in fp32 sums of exact
// products.
// 2. Bits 2, 3 and those of the loads are register bits.
// 3. Blocks within a tile: the two bits in lanes trade places with register bits, half a shuffle for each
//    value. Blocks of several warps: one exchange through shared memory makes the other bits register bits.
// 4. The last butterfly is not done before the largest magnitude is known, max(|a + b|, |a - b|) = |a| + |b|,
//    but with the rounding, in three operations for two values.
//
// In 3, blocks within a tile end with 16 neighbouring elements in a thread: one store of 16 bytes.

#pragma once

#include "rotate_quantize_tile.cuh"
#include "round.cuh"

namespace halo_train {

template <typename T>
struct RotateParams {
  const T* x;
  int64_t rows, row_stride;
  int cols, warps, log_block;  // warps of a row
  const float* col_scale;      // [cols] powers of two
  uint8_t* q;
  float* scale;
  uint32_t* tensor_amax;  // see QuantizeRowsArgs
  float norm;
};

namespace detail {

// Barrier of the warps that share a block of the rotation.
template <bool kGroups, int kThreads>
__device__ __forceinline__ void exchange_barrier(int group) {
  if constexpr (kGroups) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kThreads) : "memory");
  } else {
    __syncthreads();
  }
}

}  // namespace detail

// kBlockBits: log2 of the block within a tile; 7 stands for those up to it, of which the matrix knows, and 0
// for any. kGroups: a row has several blocks of several warps each, which wait for themselves only.
template <typename T, QType kType, int kLogValues, int kLogWarps, int kBlockBits, bool kGroups, bool kScaled>
__global__ void __launch_bounds__(512, 1) rotate_quantize_kernel(const RotateParams<T> p) {
  using namespace detail;
  using L = RotateLayout<kLogValues, kLogWarps>;
  constexpr int kQuads = Terms<T>::kQuads;
  constexpr bool kAhead = sizeof(T) == 2;  // the next row waits in registers; of fp32 values, in the L2 cache
  extern __shared__ uint4 shared[];
  __shared__ uint32_t warp_amax[2][16], largest;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = warp >> kLogWarps;
  const int log_block = L::kExchange ? L::kTileBits + kLogWarps : kBlockBits > 0 ? kBlockBits : p.log_block;
  float* const exchange = reinterpret_cast<float*>(shared);
  using Factors = std::conditional_t<L::kExchange, uint2, uint4>;
  Factors* const factors =
      reinterpret_cast<Factors*>(shared + (L::kExchange ? p.warps << (L::kTileBits - 2) : 0)) + threadIdx.x;

  const int in = (lane & 3) << 4 | (lane >> 2 & 1) << 3 | (lane >> 3) << L::kLaneBit | warp << L::kTileBits;
  const auto inside = [&](int j) { return L::kExchange || in + (j << 6) < p.cols; };
  uint4 raw[L::kLoads][kQuads];
  const auto load = [&](int64_t row) {
    const T* x = p.x + row * p.row_stride + in;
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        raw[j][k] = inside(j) ? load16(x + (j << 6) + 4 * k) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  if constexpr (kAhead) load(blockIdx.x);
  if constexpr (kScaled) {
    // Each thread reads only what it writes here.
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      float4 lo{}, hi{};
      if (inside(j)) {
        const float4* from = reinterpret_cast<const float4*>(p.col_scale + in + (j << 6));
        lo = __ldg(from), hi = __ldg(from + 1);
      }
      pack_factors(factors[j * blockDim.x], lo, hi);
    }
  }
  uint32_t a[4];
  rotate_matrix(a, kBlockBits == 7 ? p.log_block : log_block);
  const bool trade0 = !L::kExchange && log_block > L::kLaneBit;
  const bool trade1 = !L::kExchange && log_block > L::kLaneBit + 1;
  const float sign0 = trade0 && (lane & 1) ? -1.0f : 1.0f, sign1 = trade1 && (lane & 2) ? -1.0f : 1.0f;

  if (p.q == nullptr) {
    largest = 0;
    __syncthreads();
  }
  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
    const int64_t next = row + gridDim.x;
    if constexpr (!kAhead) {
      load(row);
#if __CUDA_ARCH__ >= 900
      if (threadIdx.x == 0 && next < p.rows) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.x + next * p.row_stride),
                     "r"(static_cast<uint32_t>(sizeof(T) * p.cols))
                     : "memory");
      }
#endif
    }
    float v[L::kValues];
#pragma unroll
    for (int j = 0; j < L::kLoads; j += 2) {
      Terms<T> low, high;
      uint4 f[2] = {};
      if constexpr (kScaled) {
        f[0] = bfloat16_factors(factors[j * blockDim.x]);
        f[1] = bfloat16_factors(factors[(j + 1) * blockDim.x]);
      }
      low.template set<kScaled>(raw[j], f[0]);
      high.template set<kScaled>(raw[j + 1], f[1]);
      multiply_tile(low, high, a, v + 8 * j);
    }
    if (kAhead && next < p.rows) load(next);

    butterfly_registers<2>(v);
    if constexpr (L::kExchange) {
      butterfly_registers<3>(v);
      butterfly_registers<4>(v);
      if constexpr (kLogValues > 5) butterfly_registers<5>(v);
      {
        const int base = L::word((lane & 3) << L::kLaneBit | (lane >> 2) << 4 | warp << L::kTileBits);
        float* const flipped[4] = {exchange + base, exchange + (base ^ 4), exchange + (base ^ 8),
                                   exchange + (base ^ 12)};
#pragma unroll
        for (int i = 0; i < L::kValues; i += 4) {
          const int word = L::before(i);
          *reinterpret_cast<float4*>(flipped[word >> 2 & 3] + (word & ~15)) =
              make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
      }
      exchange_barrier<kGroups, 32 * L::kWarps>(group);
      {
        constexpr int kWide = L::kLowBits < 2 ? 1 << L::kLowBits : 4;  // words of one read
        const int thread = threadIdx.x & (32 * L::kWarps - 1);
        const int base = L::word(thread << L::kLowBits) + (group << (L::kTileBits + kLogWarps));
        const float* const flipped[4] = {exchange + base, exchange + (base ^ 4), exchange + (base ^ 8),
                                         exchange + (base ^ 12)};
#pragma unroll
        for (int i = 0; i < L::kValues; i += kWide) {
          const int word = L::word(L::after(i));
          const float* from = flipped[word >> 2 & 3] + (word & ~L::kSwizzled);
          if constexpr (kWide == 4) {
            const float4 f = *reinterpret_cast<const float4*>(from);
            v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
          } else if constexpr (kWide == 2) {
            const float2 f = *reinterpret_cast<const float2*>(from);
            v[i] = f.x, v[i + 1] = f.y;
          } else {
            v[i] = *from;
          }
        }
      }
      constexpr int kFirst = L::kLowBits;
      if constexpr (kFirst < kLogValues - 1) butterfly_registers<kFirst>(v);
      if constexpr (kFirst + 1 < kLogValues - 1) butterfly_registers<kFirst + 1>(v);
      if constexpr (kFirst + 2 < kLogValues - 1) butterfly_registers<kFirst + 2>(v);
      if constexpr (kFirst + 3 < kLogValues - 1) butterfly_registers<kFirst + 3>(v);
      if constexpr (kFirst + 4 < kLogValues - 1) butterfly_registers<kFirst + 4>(v);
    } else {
      if (log_block > 7) butterfly_for_trade<4>(v, sign0);
      if constexpr (kLogValues > 5) {
        if (log_block > 8) butterfly_for_trade<5>(v, sign1);
      }
      if (trade0) trade_lanes<4>(v, 1, sign0);
      if (trade1) {
        if constexpr (kLogValues > 5) {
          trade_lanes<5>(v, 2, sign1);
        } else {
          butterfly_lanes(v, 2);
        }
      }
    }

    constexpr int kLast = L::kExchange ? kLogValues - 1 : 3;  // register bit of the last butterfly
    float best[4] = {};
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) {
      if (!(i >> kLast & 1)) best[i & 3] = max_nan(best[i & 3], fabsf(v[i]) + fabsf(v[i | 1 << kLast]));
    }
    uint32_t amax = __float_as_uint(max_nan(max_nan(best[0], best[1]), max_nan(best[2], best[3])));
    if (p.q == nullptr) {
      amax = __reduce_max_sync(0xffffffffu, amax);
      if (lane == 0) atomicMax(&largest, amax);
      if constexpr (L::kExchange) __syncthreads();  // the shared memory has been read
      continue;
    }
    if (p.tensor_amax != nullptr) {
      amax = __ldg(p.tensor_amax);
      if constexpr (L::kExchange) __syncthreads();
    } else {
      amax = __reduce_max_sync(0xffffffffu, amax);
      if (p.warps > 1) {
        if (lane == 0) warp_amax[parity][warp] = amax;
        __syncthreads();
        amax = __reduce_max_sync(0xffffffffu, lane < p.warps ? warp_amax[parity][lane] : 0);
      }
    }
    amax = magnitude(__uint_as_float(amax) * p.norm);
    const float factor = p.norm * inverse_of<kType>(amax);

    uint8_t* q = p.q + row * p.cols;
    butterfly_registers_scaled<kLast>(v, factor);
    if constexpr (L::kExchange) {
      q += ((threadIdx.x & (32 * L::kWarps - 1)) << L::kLowBits) + (group << (L::kTileBits + kLogWarps));
      constexpr int kStep = L::kLowBits == 3 ? 8 : 4;
#pragma unroll
      for (int i = 0; i < L::kValues; i += kStep) {
        const uint32_t bytes = round4<kType>(v[i], v[i + 1], v[i + 2], v[i + 3]);
        if constexpr (L::kLowBits == 3) {
          *reinterpret_cast<uint2*>(q + L::after(i)) =
              make_uint2(bytes, round4<kType>(v[i + 4], v[i + 5], v[i + 6], v[i + 7]));
        } else if constexpr (L::kLowBits == 2) {
          *reinterpret_cast<uint32_t*>(q + L::after(i)) = bytes;
        } else if constexpr (L::kLowBits == 1) {
          *reinterpret_cast<uint16_t*>(q + L::after(i)) = static_cast<uint16_t>(bytes);
          *reinterpret_cast<uint16_t*>(q + L::after(i + 2)) = static_cast<uint16_t>(bytes >> 16);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) q[L::after(i + k)] = static_cast<uint8_t>(bytes >> (8 * k));
        }
      }
    } else {
      constexpr bool kBoth = kLogValues > 5;  // lane bits can trade places
      const int lane0 = trade0 ? 7 : L::kLaneBit, register0 = trade0 ? L::kLaneBit : 7;
      const int lane1 = kBoth && trade1 ? 8 : L::kLaneBit + 1;
      const int register1 = kBoth && trade1 ? L::kLaneBit + 1 : 8;
      const int out =
          (lane & 1) << lane0 | (lane >> 1 & 1) << lane1 | (lane >> 2) << 4 | warp << L::kTileBits;
#pragma unroll
      for (int g = 0; g < L::kValues / 16; ++g) {
        const int at = out + ((g & 1) << register0) + (g >> 1 << register1);
        const float* d = v + 16 * g;
        const uint4 bytes =
            make_uint4(round4<kType>(d[0], d[1], d[2], d[3]), round4<kType>(d[4], d[5], d[6], d[7]),
                       round4<kType>(d[8], d[9], d[10], d[11]), round4<kType>(d[12], d[13], d[14], d[15]));
        if (at < p.cols) *reinterpret_cast<uint4*>(q + at) = bytes;
      }
    }
    // Last, so that one warp's division keeps nobody waiting.
    if (threadIdx.x == 0 && (p.tensor_amax == nullptr || row == 0)) p.scale[row] = scale_of<kType>(amax);
  }
  if (p.q == nullptr) {
    __syncthreads();
    if (threadIdx.x == 0) atomicMax(p.tensor_amax, largest);
  }
}

}  // namespace halo_train
