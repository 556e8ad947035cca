// Sums of the columns of a matrix from sums of parts of them, which thread blocks have written: always in the
// same order.

#pragma once

#include "quantize_common.cuh"

namespace halo_train::detail {

constexpr int kAddRows = 16;  // threads that share a column

// sums[n] = sum of partial[.., n].
static __global__ void __launch_bounds__(32 * kAddRows)
    add_partial_sums_kernel(const float* partial, float* sums, int64_t parts, int64_t cols) {
  __shared__ float shared[kAddRows][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.0f;
  if (column < cols) {
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < parts; i += kAddRows) total += __ldg(partial + i * cols + column);
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= cols) return;
#pragma unroll
  for (int i = 1; i < kAddRows; ++i) total += shared[i][threadIdx.x];
  sums[column] = total;
}

inline cudaError_t add_partial_sums(const float* partial, float* sums, int64_t parts, int64_t cols,
                                    cudaStream_t stream) {
  add_partial_sums_kernel<<<static_cast<unsigned>(ceil_div(cols, 32)), dim3(32, kAddRows), 0, stream>>>(
      partial, sums, parts, cols);
  return cudaGetLastError();
}

}  // namespace halo_train::detail
