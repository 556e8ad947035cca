// Rounding to 8 bits by rows at the speed of memory. Numerics: docs/numerics.md, section 4; the same
// operations in the same order as halo_train/ops/reference.py, so that results are equal bit by bit.

#include "quantize.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

template <typename T>
struct RowsParams {
  Matrix<T> x;
  int64_t rows, cols;
  const float* col_scale;
  uint32_t* tensor_amax;
  uint8_t* q;
  float* scale;
};

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
__device__ __forceinline__ void gather_tensor_amax(const RowsParams<T>& p, uint32_t largest) {
  largest = __reduce_max_sync(0xffffffffu, largest);
  if ((threadIdx.x & 31) == 0) atomicMax(p.tensor_amax, largest);
}

// Sixteen bytes from global to shared memory without passing through registers.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global));
}

// Column factors stay in registers if a thread has this many vectors at most, else in shared memory.
constexpr int kFactorVectors = 2;

template <typename T>
constexpr size_t rows_shared(int threads, int vectors, int stages, bool scaled) {
  return sizeof(uint4) * threads * vectors *
         (stages * sizeof(T) / 2 + (scaled && vectors > kFactorVectors ? 2 : 0));
}

constexpr int kMaxThreads = 1024;

// A thread block stays and takes whole rows, thread t the columns 8 (t + i blockDim.x) + 0..7, i < kVectors,
// in registers as they were loaded: converting them a second time costs less than the thread blocks that fp32
// copies would displace. The next kStages rows are on their way into a ring in shared memory, of which each
// thread reads only what it copied there itself.
template <typename T, QType kType, int kVectors, int kStages>
__global__ void __launch_bounds__(kMaxThreads, 1) quantize_rows_kernel(RowsParams<T> p) {
  extern __shared__ uint4 shared[];
  __shared__ uint32_t warp_amax[2][32];
  constexpr int kQuads = Eight<T>::kWords / 4;  // 16-byte pieces of eight elements
  constexpr bool kFactorsInRegisters = kVectors <= kFactorVectors;
  uint4* const ring = shared + threadIdx.x;
  float4* const factors =
      reinterpret_cast<float4*>(shared + kStages * kVectors * kQuads * blockDim.x) + threadIdx.x;
  const int cols = static_cast<int>(p.cols);
  const auto column = [&](int i) { return 8 * static_cast<int>(threadIdx.x + i * blockDim.x); };
  const auto slot = [&](int stage, int i, int k) {
    return ring + ((stage * kVectors + i) * kQuads + k) * blockDim.x;
  };
  const auto prefetch = [&](int stage, int64_t row) {
    const T* x = p.x.x + row * p.x.stride;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (row >= p.rows || column(i) >= cols) continue;
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        copy_async(slot(stage, i, k), reinterpret_cast<const uint4*>(x + column(i)) + k);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  if (cols % (8 * kVectors * blockDim.x) != 0) {  // zeros where there is nothing to copy
#pragma unroll
    for (int s = 0; s < kStages * kVectors * kQuads; ++s) ring[s * blockDim.x] = make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int s = 0; s < kStages; ++s) prefetch(s, blockIdx.x + s * static_cast<int64_t>(gridDim.x));

  float t[kFactorsInRegisters ? kVectors : 1][8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const bool inside = column(i) < cols;
    if constexpr (kFactorsInRegisters) {
      load_factors<true>(t[i], inside ? p.col_scale : nullptr, column(i), cols);
    } else if (p.col_scale != nullptr && inside) {
      const float4* from = reinterpret_cast<const float4*>(p.col_scale + column(i));
      factors[2 * i * blockDim.x] = __ldg(from);
      factors[(2 * i + 1) * blockDim.x] = __ldg(from + 1);
    }
  }
  const auto multiply = [&](float (&v)[8], int i) {
    if constexpr (kFactorsInRegisters) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= t[i][j];
    } else if (p.col_scale != nullptr) {
      const float4 lo = factors[2 * i * blockDim.x], hi = factors[(2 * i + 1) * blockDim.x];
      v[0] *= lo.x, v[1] *= lo.y, v[2] *= lo.z, v[3] *= lo.w;
      v[4] *= hi.x, v[5] *= hi.y, v[6] *= hi.z, v[7] *= hi.w;
    }
  };

  uint32_t largest = 0;
  int stage = 0, count = 0;
  for (int64_t row = blockIdx.x; row < p.rows;
       row += gridDim.x, ++count, stage = stage + 1 == kStages ? 0 : stage + 1) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1));
    Eight<T> x[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        const uint4 w = *slot(stage, i, k);
        x[i].word[4 * k] = w.x, x[i].word[4 * k + 1] = w.y;
        x[i].word[4 * k + 2] = w.z, x[i].word[4 * k + 3] = w.w;
      }
    }
    float best = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!kFactorsInRegisters && column(i) >= cols) continue;
      float v[8];
      x[i].floats(v);
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) best = max_nan(best, fabsf(v[j]));
    }
    prefetch(stage, row + kStages * static_cast<int64_t>(gridDim.x));
    if (p.q == nullptr) {
      largest = max(largest, __float_as_uint(best));
      continue;
    }
    const uint32_t amax = p.tensor_amax != nullptr ? __ldg(p.tensor_amax)
                                                   : block_max(__float_as_uint(best), warp_amax[count & 1]);
    float inverse = inverse_of<kType>(amax);
    asm volatile("" : "+f"(inverse));  // divide once, not in each branch
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) >= cols) continue;
      float v[8];
      x[i].floats(v);
      multiply(v, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= inverse;
      const uint2 bytes = {round4<kType>(v[0], v[1], v[2], v[3]), round4<kType>(v[4], v[5], v[6], v[7])};
      *reinterpret_cast<uint2*>(p.q + row * p.cols + column(i)) = bytes;
    }
    // Last, so that one warp's division keeps nobody waiting.
    if (threadIdx.x == 0 && (p.tensor_amax == nullptr || row == 0)) p.scale[row] = scale_of<kType>(amax);
  }
  if (p.q == nullptr) gather_tensor_amax(p, largest);
}

// Rows that are too wide for the ring or not made of aligned vectors: read twice, the second time mostly from
// L2.
template <typename T, QType kType, bool kVector>
__global__ void __launch_bounds__(1024) quantize_wide_rows_kernel(RowsParams<T> p) {
  __shared__ uint32_t warp_amax[2][32];
  uint32_t largest = 0;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, parity ^= 1) {
    uint32_t amax = 0;
    float v[8], f[8];
    Eight<T> x;
    for (int64_t c = 8 * threadIdx.x; c < p.cols; c += 8 * blockDim.x) {
      load_columns<kVector>(x, p.x, row, c, p.rows, p.cols);
      x.floats(v);
      load_factors<kVector>(f, p.col_scale, c, p.cols);
#pragma unroll
      for (int j = 0; j < 8; ++j) amax = max(amax, magnitude(v[j] * f[j]));
    }
    if (p.q == nullptr) {
      largest = max(largest, amax);
      continue;
    }
    amax = p.tensor_amax != nullptr ? __ldg(p.tensor_amax) : block_max(amax, warp_amax[parity]);
    if (threadIdx.x == 0 && (p.tensor_amax == nullptr || row == 0)) p.scale[row] = scale_of<kType>(amax);
    float inverse = inverse_of<kType>(amax);
    asm volatile("" : "+f"(inverse));  // divide once, not in each branch
    for (int64_t c = 8 * threadIdx.x; c < p.cols; c += 8 * blockDim.x) {
      load_columns<kVector>(x, p.x, row, c, p.rows, p.cols);
      x.floats(v);
      load_factors<kVector>(f, p.col_scale, c, p.cols);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = v[j] * f[j] * inverse;
      const uint2 bytes = {round4<kType>(v[0], v[1], v[2], v[3]), round4<kType>(v[4], v[5], v[6], v[7])};
      store8<kVector>(p.q + row * p.cols + c, bytes, p.cols - c);
    }
  }
  if (p.q == nullptr) gather_tensor_amax(p, largest);
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(256) widen_kernel(RowsParams<T> p, float* y) {
  const int64_t vectors = (p.cols + 7) / 8, total = p.rows * vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / vectors, c = 8 * (i % vectors);
    Eight<T> x;
    float v[8], f[8];
    load_columns<kVector>(x, p.x, row, c, p.rows, p.cols);
    x.floats(v);
    load_factors<kVector>(f, p.col_scale, c, p.cols);
    for (int j = 0; j < 8 && c + j < p.cols; ++j) y[row * p.cols + c + j] = v[j] * f[j];
  }
}

int threads_of_row(int64_t cols, int vectors) {
  return static_cast<int>(32 * ceil_div(cols, 32 * 8 * vectors));
}

template <typename T, QType kType, int kVectors, int kStages>
cudaError_t launch_rows(const RowsParams<T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = quantize_rows_kernel<T, kType, kVectors, kStages>;
  const int threads = threads_of_row(p.cols, kVectors);
  const size_t shared = rows_shared<T>(threads, kVectors, kStages, p.col_scale != nullptr);
  int blocks = 0;
  const cudaError_t error = resident_blocks<kKernel>(
      device, threads / 32, threads, rows_shared<T>(threads, kVectors, kStages, true), blocks);
  if (error != cudaSuccess) return error;
  kKernel<<<static_cast<unsigned>(std::min<int64_t>(p.rows, blocks)), threads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, QType kType, bool kVector>
cudaError_t launch_wide_rows(const RowsParams<T>& p, int device, cudaStream_t stream) {
  const int64_t grid = std::min<int64_t>(p.rows, 2 * int64_t{multiprocessors(device)});
  quantize_wide_rows_kernel<T, kType, kVector><<<static_cast<unsigned>(grid), kMaxThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
bool vectorised(const RowsParams<T>& p) {
  return detail::vectorised(p.x, p.cols) && aligned(p.q) && (p.col_scale == nullptr || aligned(p.col_scale));
}

// Rows of up to four vectors a thread; measured on an H200 (benchmarks/bench_quantize.py).
template <typename T, QType kType>
cudaError_t rows_sized(const RowsParams<T>& p, int device, cudaStream_t stream) {
  if (!vectorised(p)) return launch_wide_rows<T, kType, false>(p, device, stream);
  if (threads_of_row(p.cols, 4) <= kMaxThreads) {
    const cudaError_t error = launch_rows<T, kType, 4, 1>(p, device, stream);
    if (error != cudaErrorLaunchOutOfResources) return error;
  }
  return launch_wide_rows<T, kType, true>(p, device, stream);
}

}  // namespace

cudaError_t quantize_rows(const QuantizeRowsArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    const RowsParams<T> p{{static_cast<const T*>(a.x), a.row_stride},
                          a.rows,
                          a.cols,
                          a.col_scale,
                          a.tensor_amax,
                          static_cast<uint8_t*>(a.q),
                          a.scale};
    return rows_sized<T, kType>(p, a.device, stream);
  });
}

cudaError_t widen(const void* x, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                  const float* col_scale, float* y, int device, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(
      std::min<int64_t>(ceil_div(rows * ceil_div(cols, 8), 256), 16 * int64_t{multiprocessors(device)}));
  return dispatch(dtype, QType::kE4M3, [&](auto input, auto) {
    using T = typename decltype(input)::type;
    const RowsParams<T> p{{static_cast<const T*>(x), row_stride}, rows, cols, col_scale};
    if (vectorised(p)) {
      widen_kernel<T, true><<<grid, 256, 0, stream>>>(p, y);
    } else {
      widen_kernel<T, false><<<grid, 256, 0, stream>>>(p, y);
    }
    return cudaGetLastError();
  });
}

}  // namespace halo_train
