// Sums of the columns of a matrix from sums of parts of them, which thread blocks have written: always in the
// same order.

#pragma once

#include "quantize_grad_kernel.cuh"

namespace halo_train::detail {

constexpr int kAddRows = 16;  // threads that share a column

struct PartialSums {
  const float* partial;  // [parts, cols]
  float* sums;           // [cols]
  int64_t parts, cols;
};

static __global__ void __launch_bounds__(32 * kAddRows) add_partial_sums_kernel(const PartialSums p) {
  __shared__ float shared[kAddRows][32];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float total = 0.0f;
  wait_for_last_kernel();
  if (column < p.cols) {
#pragma unroll 8
    for (int64_t i = row; i < p.parts; i += kAddRows) total += __ldcg(p.partial + i * p.cols + column);
  }
  shared[row][lane] = total;
  __syncthreads();
  if (row > 0 || column >= p.cols) return;
#pragma unroll
  for (int i = 1; i < kAddRows; ++i) total += shared[i][lane];
  p.sums[column] = total;
}

inline cudaError_t add_partial_sums(const PartialSums& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, 32)));
  return launch_early(add_partial_sums_kernel, grid, 32 * kAddRows, 0, stream, p);
}

}  // namespace halo_train::detail
