// The Hadamard transform of an axis that is not the last, without a transpose: x [outer, n, inner], one read
// and one write of memory.
//
// Neighbouring threads hold neighbouring pairs of columns, so every access is a line of memory or a
// conflict-free one of shared memory. A thread holds 32 rows and does their butterflies, five bits of the
// row's number; one fp32 exchange through shared memory makes room for six more.

#pragma once

#include "hadamard_kernel.cuh"

namespace halo_train {

template <typename In, typename Out>
struct ColumnsParams {
  const In* x;
  Out* y;
  const float* signs;  // one +-1 for each of `axis` rows, or nullptr
  int64_t axis;
  int64_t inner;  // elements between rows, even
  int64_t slabs;  // groups of 2 kLanes columns in a row
  float scale;
};

namespace detail {

template <typename T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(p));
  } else {
    return *reinterpret_cast<const float2*>(p);
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* p, float2 v) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(p) = Pair<T>::pack(v.x, v.y);
  } else {
    *reinterpret_cast<float2*>(p) = v;
  }
}

// Butterflies on bits kFrom to kTo - 1 of the register index.
template <int kFrom, int kTo, int kValues>
__device__ __forceinline__ void butterfly_range(float (&v)[kValues]) {
  if constexpr (kFrom < kTo) {
    butterfly_registers<kFrom>(v);
    butterfly_range<kFrom + 1, kTo>(v);
  }
}

}  // namespace detail

// A task is 2^kLogBlock rows of 2 kLanes columns; thread blocks take kGroups of them where no exchange is
// needed.
template <int kLogBlock, int kLanes>
struct ColumnsLayout {
  static constexpr int kLogRows = kLogBlock < 5 ? kLogBlock : 5;  // rows of a thread
  static constexpr int kRows = 1 << kLogRows;
  static constexpr int kParts = 1 << (kLogBlock - kLogRows);  // threads that share a column
  static constexpr int kGroups = kParts == 1 ? 256 / kLanes : 1;
  static constexpr int kThreads = kParts * kLanes * kGroups;
  static constexpr size_t kSharedBytes = kParts == 1 ? 0 : sizeof(float2) * kLanes << kLogBlock;
  static constexpr int kResident = kThreads > 256 ? 1 : 3;  // on a multiprocessor: 80 registers for 64 values
  static_assert(kParts <= kRows, "the exchange leaves every bit in a register");
};

template <typename In, typename Out, int kLogBlock, int kLanes>
__global__ void __launch_bounds__(ColumnsLayout<kLogBlock, kLanes>::kThreads,
                                  ColumnsLayout<kLogBlock, kLanes>::kResident)
    hadamard_columns(const ColumnsParams<In, Out> p, const int64_t tasks) {
  using L = ColumnsLayout<kLogBlock, kLanes>;
  extern __shared__ float2 exchange[];
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes % L::kParts;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * L::kGroups + threadIdx.x / (kLanes * L::kParts);
  if (task >= tasks) return;
  const int64_t block = task / p.slabs, slab = task - block * p.slabs;
  const int64_t column = slab * 2 * kLanes + 2 * lane;
  const bool valid = column < p.inner;
  const int64_t first = (block << kLogBlock) * p.inner + column;

  float a[L::kRows], b[L::kRows];
#pragma unroll
  for (int i = 0; i < L::kRows; ++i) {
    const float2 v =
        valid ? detail::load_pair(p.x + first + (part * L::kRows + i) * p.inner) : make_float2(0.0f, 0.0f);
    a[i] = v.x, b[i] = v.y;
  }
  if (p.signs != nullptr) {
    const float* signs = p.signs + (block << kLogBlock) % p.axis + part * L::kRows;
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) {
      const float sign = __ldg(signs + i);
      a[i] *= sign, b[i] *= sign;
    }
  }
  detail::butterfly_range<0, L::kLogRows>(a);
  detail::butterfly_range<0, L::kLogRows>(b);
  if constexpr (L::kParts > 1) {
    constexpr int kRun = L::kRows / L::kParts;  // register r * kRun + i: row r * kRows + part * kRun + i
#pragma unroll
    for (int i = 0; i < L::kRows; ++i)
      exchange[(part * L::kRows + i) * kLanes + lane] = make_float2(a[i], b[i]);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < L::kParts; ++r) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float2 v = exchange[(r * L::kRows + part * kRun + i) * kLanes + lane];
        a[r * kRun + i] = v.x, b[r * kRun + i] = v.y;
      }
    }
    constexpr int kLogRun = L::kLogRows - (kLogBlock - L::kLogRows);
    detail::butterfly_range<kLogRun, L::kLogRows>(a);
    detail::butterfly_range<kLogRun, L::kLogRows>(b);
    if (!valid) return;
#pragma unroll
    for (int r = 0; r < L::kParts; ++r) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        detail::store_pair(p.y + first + (r * L::kRows + part * kRun + i) * p.inner,
                           make_float2(a[r * kRun + i] * p.scale, b[r * kRun + i] * p.scale));
      }
    }
  } else {
    if (!valid) return;
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) {
      detail::store_pair(p.y + first + i * p.inner, make_float2(a[i] * p.scale, b[i] * p.scale));
    }
  }
}

}  // namespace halo_train
