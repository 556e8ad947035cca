// Rounding to 8 bits by rows at the speed of memory. Numerics: docs/numerics.md, section 4; the same
// operations in the same order as halo_train/reference.py, so that results are equal bit by bit.

#include "quantize.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

// The largest of a value over the thread block. `slot` alternates between calls, so that one barrier a call
// suffices.
__device__ __forceinline__ uint32_t block_max(uint32_t value, uint32_t* slot) {
  value = __reduce_max_sync(0xffffffffu, value);
  if ((threadIdx.x & 31) == 0) slot[threadIdx.x >> 5] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x & 31;
  return __reduce_max_sync(0xffffffffu, lane < blockDim.x >> 5 ? slot[lane] : 0);
}

template <typename T>
__device__ __forceinline__ void store_partial(const RowsParams<T>& p, int64_t column,
                                              const uint32_t (&amax)[8]) {
  uint4* to = reinterpret_cast<uint4*>(p.partial_amax + blockIdx.x * p.cols + column);
  to[0] = make_uint4(amax[0], amax[1], amax[2], amax[3]);
  to[1] = make_uint4(amax[4], amax[5], amax[6], amax[7]);
}

// A thread block takes whole rows, thread t the columns 8 (t + i blockDim.x) + 0..7, i < kVectors, in
// registers as they were loaded: converting them a second time costs less than the thread blocks that fp32
// copies would displace. The next row is loaded before this one's largest magnitude is found.
template <typename T, QType kType, int kVectors, bool kAmax>
__global__ void __launch_bounds__(1024, 1) quantize_rows_kernel(RowsParams<T> p) {
  __shared__ uint32_t warp_amax[2][32];
  const auto column = [&](int i) { return 8 * (static_cast<int64_t>(threadIdx.x) + i * blockDim.x); };
  const auto multiply = [&](float (&v)[8], int i) {
    if (p.col_scale == nullptr) return;
    float f[8];
    load_factors<true>(f, p.col_scale, column(i), p.cols);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= f[j];
  };
  uint32_t col_amax[kAmax ? kVectors : 1][8] = {};
  Eight<T> now[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) load_columns<T, true>(now[i], p, blockIdx.x, column(i));
  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
    Eight<T> next[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load_columns<T, true>(next[i], p, row + gridDim.x, column(i));
    const float row_factor = kAmax ? __ldg(p.row_scale + row) : 0.0f;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) >= p.cols) continue;
      float v[8];
      now[i].floats(v);
      if constexpr (kAmax) {
#pragma unroll
        for (int j = 0; j < 8; ++j) col_amax[i][j] = max(col_amax[i][j], magnitude(v[j] * row_factor));
      }
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) amax = max(amax, magnitude(v[j]));
    }
    amax = block_max(amax, warp_amax[parity]);
    if (threadIdx.x == 0) p.scale[row] = scale_of<kType>(amax);
    float inverse = inverse_of<kType>(amax);
    asm volatile("" : "+f"(inverse));  // divide once, not in each branch
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) >= p.cols) continue;
      float v[8];
      now[i].floats(v);
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= inverse;
      const uint2 bytes = {round4<kType>(v[0], v[1], v[2], v[3]), round4<kType>(v[4], v[5], v[6], v[7])};
      *reinterpret_cast<uint2*>(p.q + row * p.cols + column(i)) = bytes;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) now[i] = next[i];
  }
  if constexpr (kAmax) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < p.cols) store_partial(p, column(i), col_amax[i]);
    }
  }
}

// Sixteen bytes from global to shared memory without passing through registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global));
}

// Rows in the ring, the one that is worked on included: 57 KB under way hide the latency of memory, and a
// third row would take the L1 cache from the column factors.
constexpr int kStages = 2;

// The same for rows that leave no registers to load ahead: they wait in a ring in shared memory, of which
// each thread reads only what it copied there itself.
template <typename T, QType kType, int kVectors, bool kAmax>
__global__ void __launch_bounds__(1024, 1) quantize_long_rows_kernel(RowsParams<T> p) {
  extern __shared__ uint4 ring[];
  __shared__ uint32_t warp_amax[2][32];
  constexpr int kQuads = Eight<T>::kWords / 4;  // 16-byte pieces of eight elements
  const auto column = [&](int i) { return 8 * (static_cast<int64_t>(threadIdx.x) + i * blockDim.x); };
  const auto slot = [&](int stage, int i) {
    return ring + ((stage * kVectors + i) * blockDim.x + threadIdx.x) * kQuads;
  };
  const auto prefetch = [&](int stage, int64_t row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (row >= p.rows || column(i) >= p.cols) continue;
      const auto* from = reinterpret_cast<const uint4*>(p.x + row * p.row_stride + column(i));
#pragma unroll
      for (int k = 0; k < kQuads; ++k) copy_async(slot(stage, i) + k, from + k);
    }
    asm volatile("cp.async.commit_group;");
  };
  const auto fetch = [&](float (&v)[8], int stage, int i) {
    Eight<T> x;
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const uint4 w = slot(stage, i)[k];
      x.word[4 * k] = w.x, x.word[4 * k + 1] = w.y, x.word[4 * k + 2] = w.z, x.word[4 * k + 3] = w.w;
    }
    x.floats(v);
  };
  const auto multiply = [&](float (&v)[8], int i) {
    if (p.col_scale == nullptr) return;
    float f[8];
    load_factors<true>(f, p.col_scale, column(i), p.cols);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= f[j];
  };

  uint32_t col_amax[kAmax ? kVectors : 1][8] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) prefetch(s, blockIdx.x + s * static_cast<int64_t>(gridDim.x));
  int stage = 0, parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows;
       row += gridDim.x, parity ^= 1, stage = stage + 1 == kStages ? 0 : stage + 1) {
    prefetch(stage == 0 ? kStages - 1 : stage - 1, row + (kStages - 1) * static_cast<int64_t>(gridDim.x));
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1));
    const float row_factor = kAmax ? __ldg(p.row_scale + row) : 0.0f;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) >= p.cols) continue;
      float v[8];
      fetch(v, stage, i);
      if constexpr (kAmax) {
#pragma unroll
        for (int j = 0; j < 8; ++j) col_amax[i][j] = max(col_amax[i][j], magnitude(v[j] * row_factor));
      }
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) amax = max(amax, magnitude(v[j]));
    }
    amax = block_max(amax, warp_amax[parity]);
    if (threadIdx.x == 0) p.scale[row] = scale_of<kType>(amax);
    float inverse = inverse_of<kType>(amax);
    asm volatile("" : "+f"(inverse));  // divide once, not in each branch
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) >= p.cols) continue;
      float v[8];
      fetch(v, stage, i);
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= inverse;
      const uint2 bytes = {round4<kType>(v[0], v[1], v[2], v[3]), round4<kType>(v[4], v[5], v[6], v[7])};
      store8<true>(p.q + row * p.cols + column(i), bytes, 8);
    }
  }
  if constexpr (kAmax) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < p.cols) store_partial(p, column(i), col_amax[i]);
    }
  }
}

constexpr int kReduceRows = 32;  // threads that share a column

// col_amax[n] = max of partial[.., n].
__global__ void __launch_bounds__(32 * kReduceRows)
    reduce_amax_kernel(const uint32_t* partial, uint32_t* col_amax, int parts, int64_t cols) {
  __shared__ uint32_t best[kReduceRows][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  uint32_t amax = 0;
  if (column < cols) {
#pragma unroll 8
    for (int i = threadIdx.y; i < parts; i += kReduceRows)
      amax = max(amax, __ldg(partial + i * cols + column));
  }
  best[threadIdx.y][threadIdx.x] = amax;
  __syncthreads();
  if (threadIdx.y > 0 || column >= cols) return;
#pragma unroll
  for (int i = 1; i < kReduceRows; ++i) amax = max(amax, best[i][threadIdx.x]);
  col_amax[column] = amax;
}

// Rows that are too wide for the ring or not made of aligned vectors: read twice, the second time mostly from
// L2.
template <typename T, QType kType, bool kVector>
__global__ void __launch_bounds__(1024) quantize_wide_rows_kernel(RowsParams<T> p) {
  __shared__ uint32_t warp_amax[2][32];
  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
    uint32_t amax = 0;
    float v[8], f[8];
    Eight<T> x;
    for (int64_t c = 8 * threadIdx.x; c < p.cols; c += 8 * blockDim.x) {
      load_columns<T, kVector>(x, p, row, c);
      x.floats(v);
      load_factors<kVector>(f, p.col_scale, c, p.cols);
#pragma unroll
      for (int j = 0; j < 8; ++j) amax = max(amax, magnitude(v[j] * f[j]));
    }
    amax = block_max(amax, warp_amax[parity]);
    if (threadIdx.x == 0) p.scale[row] = scale_of<kType>(amax);
    float inverse = inverse_of<kType>(amax);
    asm volatile("" : "+f"(inverse));  // divide once, not in each branch
    for (int64_t c = 8 * threadIdx.x; c < p.cols; c += 8 * blockDim.x) {
      load_columns<T, kVector>(x, p, row, c);
      x.floats(v);
      load_factors<kVector>(f, p.col_scale, c, p.cols);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = v[j] * f[j] * inverse;
      const uint2 bytes = {round4<kType>(v[0], v[1], v[2], v[3]), round4<kType>(v[4], v[5], v[6], v[7])};
      store8<kVector>(p.q + row * p.cols + c, bytes, p.cols - c);
    }
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(256) widen_kernel(RowsParams<T> p, float* y) {
  const int64_t vectors = (p.cols + 7) / 8, total = p.rows * vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / vectors, c = 8 * (i % vectors);
    Eight<T> x;
    float v[8], f[8];
    load_columns<T, kVector>(x, p, row, c);
    x.floats(v);
    load_factors<kVector>(f, p.col_scale, c, p.cols);
    for (int j = 0; j < 8 && c + j < p.cols; ++j) y[row * p.cols + c + j] = v[j] * f[j];
  }
}

constexpr int kVectors = 2, kLongVectors = 4;  // of eight columns in a thread
constexpr int kMaxThreads = 1024;
constexpr int kMaxBlocks = 16;  // on a multiprocessor
constexpr int kMultiprocessorShared =
    225280;  // bytes for rings; the static part and the system's come on top

int threads_of_row(int64_t cols, int vectors) {
  return static_cast<int>(32 * ceil_div(cols, 32 * 8 * vectors));
}

// Thread blocks on a multiprocessor before registers and shared memory are asked about.
int max_blocks(int64_t cols) {
  return std::max(1, std::min(kMaxBlocks, 2048 / threads_of_row(cols, kVectors)));
}

template <auto kKernel>
int registers_of() {
  static const int registers = [] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess ? attributes.numRegs : 255;
  }();
  return registers;
}

template <auto kKernel, typename T>
cudaError_t launch_rows(const RowsParams<T>& p, int threads, size_t shared, int device, cudaStream_t stream) {
  if (shared > 40 * 1024) {  // 48 KB with the static part are there without asking
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMultiprocessorShared);
    if (error != cudaSuccess) return error;
  }
  int blocks = std::min(max_blocks(p.cols), 65536 / (registers_of<kKernel>() * threads));
  if (shared > 0) blocks = std::min(blocks, static_cast<int>(kMultiprocessorShared / (shared + 2048)));
  const int64_t grid = std::min<int64_t>(p.rows, int64_t{multiprocessors(device)} * std::max(1, blocks));
  kKernel<<<static_cast<unsigned>(grid), threads, shared, stream>>>(p);
  cudaError_t error = cudaGetLastError();
  if (p.col_amax != nullptr && error == cudaSuccess) {
    reduce_amax_kernel<<<static_cast<unsigned>(ceil_div(p.cols, 32)), dim3(32, kReduceRows), 0, stream>>>(
        p.partial_amax, p.col_amax, static_cast<int>(grid), p.cols);
    error = cudaGetLastError();
  }
  return error;
}

template <typename T, QType kType, bool kVector>
cudaError_t launch_wide_rows(const RowsParams<T>& p, int device, cudaStream_t stream) {
  const int64_t grid = std::min<int64_t>(p.rows, 2 * int64_t{multiprocessors(device)});
  quantize_wide_rows_kernel<T, kType, kVector><<<static_cast<unsigned>(grid), kMaxThreads, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess || p.col_amax == nullptr ? error : launch_column_amax<T, kVector>(p, stream);
}

template <typename T, QType kType>
cudaError_t rows_sized(const RowsParams<T>& p, int device, cudaStream_t stream) {
  const bool amax = p.col_amax != nullptr;
  if (!vectorised(p)) return launch_wide_rows<T, kType, false>(p, device, stream);
  const int threads = threads_of_row(p.cols, kVectors), long_threads = threads_of_row(p.cols, kLongVectors);
  if (threads <= kMaxThreads) {
    return amax ? launch_rows<quantize_rows_kernel<T, kType, kVectors, true>>(p, threads, 0, device, stream)
                : launch_rows<quantize_rows_kernel<T, kType, kVectors, false>>(p, threads, 0, device, stream);
  }
  const size_t ring = sizeof(Eight<T>) * long_threads * kLongVectors * kStages;
  if (long_threads <= kMaxThreads && ring <= kMultiprocessorShared) {
    return amax ? launch_rows<quantize_long_rows_kernel<T, kType, kLongVectors, true>>(p, long_threads, ring,
                                                                                       device, stream)
                : launch_rows<quantize_long_rows_kernel<T, kType, kLongVectors, false>>(p, long_threads, ring,
                                                                                        device, stream);
  }
  return launch_wide_rows<T, kType, true>(p, device, stream);
}

}  // namespace

cudaError_t quantize_rows(const QuantizeRowsArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    const RowsParams<T> p{static_cast<const T*>(a.x),
                          a.rows,
                          a.cols,
                          a.row_stride,
                          a.col_scale,
                          a.row_scale,
                          a.col_amax,
                          a.partial_amax,
                          static_cast<uint8_t*>(a.q),
                          a.scale};
    return rows_sized<T, kType>(p, a.device, stream);
  });
}

int64_t quantize_rows_scratch(int64_t cols, int device) {
  return int64_t{multiprocessors(device)} * max_blocks(cols) * cols;
}

cudaError_t widen(const void* x, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                  const float* col_scale, float* y, int device, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(
      std::min<int64_t>(ceil_div(rows * ceil_div(cols, 8), 256), 16 * int64_t{multiprocessors(device)}));
  return dispatch(dtype, QType::kE4M3, [&](auto input, auto) {
    using T = typename decltype(input)::type;
    const RowsParams<T> p{static_cast<const T*>(x), rows, cols, row_stride, col_scale};
    if (vectorised(p)) {
      widen_kernel<T, true><<<grid, 256, 0, stream>>>(p, y);
    } else {
      widen_kernel<T, false><<<grid, 256, 0, stream>>>(p, y);
    }
    return cudaGetLastError();
  });
}

}  // namespace halo_train
