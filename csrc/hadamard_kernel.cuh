// The Hadamard kernel family: y = scale * (x diag(signs)) (I kron H_n) diag(out_scale), n = 2^kLogN, one read
// and one write of memory.
//
// hadamard_tile.cuh does the arithmetic; here are the loads, the exchange between warps and the stores.
// hadamard_pair.cuh has float32 blocks of 32768.

#pragma once

#include "hadamard_tile.cuh"

namespace halo_train {

template <typename T>
struct HadamardParams {
  const T* x;
  T* y;                    // contiguous
  const T* signs;          // one value per position, of which only the sign bit is used, or nullptr
  const float* out_scale;  // one factor per position, for kernels with kFactors
  int64_t total;           // elements
  int64_t row_stride;      // elements between rows of x
  uint32_t axis;  // 16-byte vectors in a row; a multiple of the block except for blocks below one vector
  bool split;     // inputs must be located by (row, column): x has gaps between rows or there are signs
  float scale;
  int log_block;  // actual block, for the kernel that serves several small ones
};

namespace detail {

// Row and column of a 16-byte vector; 64-bit division only where 32 bits do not hold the number.
__device__ __forceinline__ void locate(int64_t vector, uint32_t axis, int64_t& row, uint32_t& column) {
  if (vector >> 32) {
    row = vector / axis;
    column = static_cast<uint32_t>(vector - row * axis);
  } else {
    const uint32_t v = static_cast<uint32_t>(vector);
    row = v / axis;
    column = v % axis;
  }
}

template <typename T>
__device__ __forceinline__ uint4 load_vector(const HadamardParams<T>& p, int64_t vector) {
  constexpr int kVector = 16 / sizeof(T);
  if (!p.split) return load16(p.x + vector * kVector);
  int64_t row;
  uint32_t column;
  locate(vector, p.axis, row, column);
  uint4 v = load16(p.x + row * p.row_stride + static_cast<int64_t>(column) * kVector);
  if (p.signs != nullptr) flip_signs<T>(v, __ldg(reinterpret_cast<const uint4*>(p.signs) + column));
  return v;
}

// The last few elements of the tensor, fewer than a vector, which only blocks below one vector can leave.
template <typename T>
__device__ uint4 load_tail(const HadamardParams<T>& p, int64_t index) {
  constexpr int kVector = 16 / sizeof(T);
  uint32_t u[4] = {};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (index + i >= p.total) continue;
    float value = static_cast<float>(p.x[index + i]);
    if (p.signs != nullptr) {
      value = copysignf(1.0f, static_cast<float>(p.signs[(index + i) % (int64_t{p.axis} * kVector)])) * value;
    }
    if constexpr (sizeof(T) == 2) {
      u[i / 2] |= (Pair<T>::pack(value, 0.0f) & 0xffffu) << 16 * (i % 2);
    } else {
      u[i] = __float_as_uint(value);
    }
  }
  return make_uint4(u[0], u[1], u[2], u[3]);
}

template <typename T>
__device__ void store_tail(const HadamardParams<T>& p, int64_t index, const uint4& v) {
  const uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    if (index + i >= p.total) continue;
    if constexpr (sizeof(T) == 2) {
      const float2 pair = Pair<T>::unpack(u[i / 2]);
      p.y[index + i] = static_cast<T>(i % 2 ? pair.y : pair.x);
    } else {
      p.y[index + i] = __uint_as_float(u[i]);
    }
  }
}

// v, in the layout of transform_tile, times the scale and the factors of its columns. `first` is the first
// element of the tile, whose end may lie beyond that of the tensor.
template <typename L>
__device__ __forceinline__ void scale_tile(float (&v)[L::kValues], const HadamardParams<typename L::T>& p,
                                           int64_t first) {
  const int lane = threadIdx.x & 31;
  const auto column = [&](int64_t index) {
    int64_t row;
    uint32_t vector;
    locate(index >> L::kVectorBits, p.axis, row, vector);
    return vector << L::kVectorBits;
  };
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    if constexpr (L::kTensor) {
      // Rows are whole blocks of at least 32, so only index bit 5 can lead into another one.
      const int64_t index = first + ((lane & 3) << L::kLaneBit | (lane >> 3) << 3) + (j << L::kLineBit);
      const uint32_t low = column(index);
      const uint32_t high =
          low + 32 < p.axis << L::kVectorBits ? low + 32 : low + 32 - (p.axis << L::kVectorBits);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i & 2) continue;
        const float2 f = __ldg(reinterpret_cast<const float2*>(p.out_scale + (i & 1 ? high : low) +
                                                               ((lane >> 2 & 1) << 1 | (i >> 2) << 2)));
        v[8 * j + i] *= p.scale * f.x;
        v[8 * j + i + 2] *= p.scale * f.y;
      }
    } else {
      const uint32_t start =
          column(first + ((lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit) + (j << L::kLineBit));
#pragma unroll
      for (int i = 0; i < L::kVector; ++i) v[L::kVector * j + i] *= p.scale * __ldg(p.out_scale + start + i);
    }
  }
}

// Factors of kCount neighbouring columns, kCount of them aligned.
template <int kCount>
__device__ __forceinline__ void multiply_values(float* v, float scale, const float* factors) {
  float f[kCount];
  if constexpr (kCount >= 4) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(factors + i));
      f[i] = four.x, f[i + 1] = four.y, f[i + 2] = four.z, f[i + 3] = four.w;
    }
  } else if constexpr (kCount == 2) {
    const float2 two = __ldg(reinterpret_cast<const float2*>(factors));
    f[0] = two.x, f[1] = two.y;
  } else {
    f[0] = __ldg(factors);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] *= scale * f[i];
}

}  // namespace detail

// Blocks within one warp, one tile for a warp.
template <typename L, int kThreads, bool kFactors>
__global__ void __launch_bounds__(kThreads) hadamard_warp(const HadamardParams<typename L::T> p) {
  static_assert(L::kLogN <= L::kWarpBit, "larger blocks take hadamard_block");
  using T = typename L::T;
  constexpr int kTile = 1 << L::kWarpBit;
  const int lane = threadIdx.x & 31;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;

  // Index of the lane's first element in a tile, on the way in and on the way out.
  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit;
  const int out = L::kTensor ? (lane & 3) << L::kLaneBit | (lane >> 2 & 1) << 5 | (lane >> 3) << 3 : in;

  uint32_t a[4] = {};
  const int64_t first = warp * kTile;
  uint4 raw[1][L::kLoads];
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    const int64_t index = first + in + (j << L::kLineBit);
    raw[0][j] = make_uint4(0, 0, 0, 0);
    if (index + L::kVector <= p.total) {
      raw[0][j] = detail::load_vector(p, index / L::kVector);
    } else if constexpr (L::kSmall) {  // larger blocks are whole vectors
      raw[0][j] = detail::load_tail(p, index);
    }
  }
  if constexpr (L::kTensor) detail::sign_matrix<T>(a);
  float v[L::kValues];
  transform_tile<L>(raw, a, v, false, p.log_block);
  if constexpr (kFactors) {
    detail::scale_tile<L>(v, p, first);
  } else {
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) v[i] *= p.scale;
  }
  pack_tile<L>(v, raw[0]);
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    const int64_t index = first + out + (j << L::kLineBit);
    if (index + L::kVector <= p.total) {
      *reinterpret_cast<uint4*>(p.y + index) = raw[0][j];
    } else if constexpr (L::kSmall) {
      detail::store_tail(p, index, raw[0][j]);
    }
  }
}

namespace detail {

// Barrier of the threads that share a Hadamard block. The number of a barrier must be a constant: with a
// number in a register the compiler reserves all sixteen, which limits a multiprocessor to four thread
// blocks.
template <int kThreads, int kGroups, int kGroup = 0>
__device__ __forceinline__ void group_barrier(int group) {
  if constexpr (kThreads == 32) {
    __syncwarp();
  } else if constexpr (kGroups == 1) {
    __syncthreads();
  } else if constexpr (kGroup == kGroups - 1) {
    asm volatile("bar.sync %0, %1;" ::"n"(kGroup + 1), "n"(kThreads) : "memory");
  } else if (group == kGroup) {
    asm volatile("bar.sync %0, %1;" ::"n"(kGroup + 1), "n"(kThreads) : "memory");
  } else {
    group_barrier<kThreads, kGroups, kGroup + 1>(group);
  }
}

}  // namespace detail

// Blocks of at least one tile: kWarps warps for a task, kGroups tasks side by side in a thread block; a task
// is a Hadamard block, or half of one (see kParts).
//
// The hardware hands out thread blocks in order, so that all work at neighbouring addresses, and several on
// one multiprocessor cover for each other's barriers. Once a task has its own input, it calls that of the
// task `ahead` later into the L2 cache, for the memory to stay busy while everybody computes. Where only one
// thread block fits on a multiprocessor (kStay), it strides over the tasks instead and loads the next one
// while it computes.
template <typename L, int kGroups, int kMinBlocks, bool kStay, bool kFactors>
__global__ void __launch_bounds__(32 * L::kWarps * kGroups, kMinBlocks)
    hadamard_block(const HadamardParams<typename L::T> p, const uint32_t ahead) {
  static_assert(L::kExchange, "smaller blocks take hadamard_warp");
  static_assert(!kStay || (kGroups == 1 && L::kParts == 1 && L::kTensor && L::kLoads == 8),
                "for the largest block");
  using T = typename L::T;
  constexpr int kThreads = 32 * L::kWarps;
  extern __shared__ float shared_memory[];
  const int group = kGroups == 1 ? 0 : threadIdx.x / kThreads;
  const int thread = kGroups == 1 ? threadIdx.x : threadIdx.x % kThreads;
  const int lane = thread & 31;
  const int warp = thread / 32;
  float* const shared = shared_memory + (group << L::kLogN);

  // 32 bits: of 512 elements at least, no memory holds more.
  const uint32_t tasks = static_cast<uint32_t>(p.total >> L::kLogN);
  uint32_t task = blockIdx.x * kGroups + group;
  if (kGroups > 1 && task >= tasks) return;

  // First element of the input of a task, and its column.
  const auto source = [&](uint32_t index, uint32_t& column) {
    constexpr int kLogBlock = L::kLogN + L::kLogParts;
    const uint32_t block = index >> L::kLogParts;
    column = 0;
    if (!p.split) return p.x + (static_cast<int64_t>(block) << kLogBlock);
    const uint32_t blocks = p.axis >> (kLogBlock - L::kVectorBits), row = block / blocks;
    column = block % blocks << kLogBlock;
    return p.x + row * p.row_stride + column;
  };
  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit | warp << L::kWarpBit;
  const int out = L::out(thread);
  uint32_t column;
  uint4 raw[L::kParts][L::kLoads];
  const auto load = [&](uint32_t index) {
    const T* x = source(index, column) + in;
#pragma unroll
    for (int i = 0; i < L::kParts; ++i) {
#pragma unroll
      for (int j = 0; j < L::kLoads; ++j) raw[i][j] = detail::load16(x + (i << L::kLogN) + L::load(j));
    }
  };
  if (L::kTrade && p.signs != nullptr) {
    // As many bytes as the input: on their way together.
    const T* const x = source(task, column) + in;
    const T* const signs = p.signs + column + in;
    uint4 change[L::kLoads];
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      change[j] = __ldg(reinterpret_cast<const uint4*>(signs + L::load(j)));
      raw[0][j] = detail::load16(x + L::load(j));
    }
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) detail::flip_signs<T>(raw[0][j], change[j]);
  } else {
    load(task);
  }
  uint32_t a[4] = {};
  if constexpr (L::kTensor) detail::sign_matrix<T>(a);

  // Of thread blocks that stay: bits 15 - i % 16 and 31 - i % 16 of flips[i / 16] are the signs of the i-th
  // word of raw.
  uint32_t flips[2];
  uint32_t flips_column = ~0u;
  for (;;) {
    if (!L::kTrade && p.signs != nullptr) {
      const T* signs = p.signs + column + in;
      if constexpr (kStay) {
        if (column != flips_column) {
          flips_column = column;
          flips[0] = flips[1] = 0;
#pragma unroll
          for (int j = 0; j < L::kLoads; ++j) {
            const uint4 s = __ldg(reinterpret_cast<const uint4*>(signs + L::load(j)));
            flips[j / 4] |= (s.x & 0x80008000u) >> (4 * j % 16) | (s.y & 0x80008000u) >> (4 * j % 16 + 1) |
                            (s.z & 0x80008000u) >> (4 * j % 16 + 2) | (s.w & 0x80008000u) >> (4 * j % 16 + 3);
          }
        }
#pragma unroll
        for (int j = 0; j < L::kLoads; ++j) {
          const uint32_t bits = flips[j / 4] << (4 * j % 16);
          raw[0][j].x ^= bits & 0x80008000u;
          raw[0][j].y ^= bits << 1 & 0x80008000u;
          raw[0][j].z ^= bits << 2 & 0x80008000u;
          raw[0][j].w ^= bits << 3 & 0x80008000u;
        }
      } else {
#pragma unroll
        for (int i = 0; i < L::kParts; ++i) {
#pragma unroll
          for (int j = 0; j < L::kLoads; ++j) {
            const T* s = signs + (i << L::kLogN) + L::load(j);
            detail::flip_signs<T>(raw[i][j], __ldg(reinterpret_cast<const uint4*>(s)));
          }
        }
      }
    }
    float v[L::kValues];
    transform_tile<L>(raw, a, v, L::kParts > 1 && (task & 1), 0);
    const uint32_t next = task + (kStay ? gridDim.x : ahead);
    const auto call_ahead = [&] {
#if __CUDA_ARCH__ >= 900
      if (ahead > 0 && thread == 0 && next < tasks) {
        uint32_t unused;
        const T* x = source(next, unused) + ((next & (L::kParts - 1)) << L::kLogN);
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(x), "n"(sizeof(T) << L::kLogN)
                     : "memory");
      }
#endif
    };
    if constexpr (kStay) {
      if (next < tasks) load(next);
      if (task != blockIdx.x)
        detail::group_barrier<kThreads, kGroups>(group);  // the shared memory has been read
    } else if constexpr (!L::kTrade) {
      call_ahead();
    }

    // Addresses are a base with its swizzled bits flipped plus a constant, which becomes part of the
    // instruction.
    if constexpr (L::kTensor) {
      const int base =
          L::word((lane & 3) << L::kLaneBit | (lane >> 2 & 1) << 1 | (lane >> 3) << 3 | warp << L::kWarpBit);
      float* const flipped[2] = {shared + base, shared + (base ^ 1 << 2)};
#pragma unroll
      for (int i = 0; i < L::kValues; ++i) {
        if (i & 2) continue;
        const int word = L::word((i & 1) << 5 | (i >> 2 & 1) << 2 | L::load(i >> 3));
        float* target = flipped[word >> 2 & 1] + (word & ~L::kSwizzled);
        *reinterpret_cast<float2*>(target) = make_float2(v[i], v[i + 2]);
      }
    } else {
      const int base = L::word(in);
#pragma unroll
      for (int j = 0; j < L::kLoads; ++j) {
        *reinterpret_cast<float4*>(shared + (base ^ L::word(j << L::kLineBit))) =
            make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
      }
      if constexpr (L::kTrade) {
        __syncwarp();
        call_ahead();  // nothing before this barrier makes the compiler wait for the own input first
        const int loads = lane >> 2;
        detail::trade_in_warp<1 << L::kLaneBit>(
            v, shared + (warp << L::kWarpBit | loads << L::kLineBit | (lane & 3)), loads << 2);
      }
    }
    detail::group_barrier<kThreads, kGroups>(group);
    {
      constexpr int kWide = L::kLowBits < 2 ? 1 << L::kLowBits : 4;  // words of one read
      const int base = L::word(out);
      const float* const flipped[4] = {shared + base, shared + (base ^ 1 << 2), shared + (base ^ 1 << 4),
                                       shared + (base ^ L::kSwizzled)};
#pragma unroll
      for (int i = 0; i < L::kValues; i += kWide) {
        const int word = L::word((i & ((1 << L::kLowBits) - 1)) | i >> L::kLowBits << L::kHighBit);
        const float* from = flipped[(word >> 2 & 1) | (word >> 4 & 1) << 1] + (word & ~L::kSwizzled);
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
    if constexpr (L::kHighBits > 1 && L::kHighBit + 0 >= L::kDone)
      detail::butterfly_registers<L::kLowBits>(v);
    if constexpr (L::kHighBits > 2 && L::kHighBit + 1 >= L::kDone)
      detail::butterfly_registers<L::kLowBits + 1>(v);
    if constexpr (L::kHighBits > 3 && L::kHighBit + 2 >= L::kDone)
      detail::butterfly_registers<L::kLowBits + 2>(v);
    if constexpr (L::kHighBits > 4 && L::kHighBit + 3 >= L::kDone)
      detail::butterfly_registers<L::kLowBits + 3>(v);
    if constexpr (L::kHighBits > 5 && L::kHighBit + 4 >= L::kDone)
      detail::butterfly_registers<L::kLowBits + 4>(v);
    static_assert(L::kLogN - 1 >= L::kDone, "the top bit is left for the last butterfly");
    if constexpr (kFactors) {
      detail::butterfly_registers<L::kLogValues - 1>(v);
      const uint32_t blocks = p.axis >> (L::kLogN - L::kVectorBits);
      const float* factors = p.out_scale + (task % blocks << L::kLogN) + out;
#pragma unroll
      for (int i = 0; i < L::kValues; i += 1 << L::kLowBits) {
        detail::multiply_values<1 << L::kLowBits>(v + i, p.scale,
                                                  factors + (i >> L::kLowBits << L::kHighBit));
      }
    } else {
      detail::butterfly_registers_scaled<L::kLogValues - 1>(v, p.scale);
    }

    T* y = p.y + (static_cast<int64_t>(task) << L::kLogN) + out;
#pragma unroll
    for (int i = 0; i < L::kValues; i += 1 << L::kLowBits) {
      detail::store_values<1 << L::kLowBits>(y + (static_cast<int64_t>(i >> L::kLowBits) << L::kHighBit),
                                             v + i);
    }
    if (!kStay || next >= tasks) return;
    task = next;
  }
}

}  // namespace halo_train
