// What the fused kernels of rotate_quantize_kernel.cuh do not take (odd widths and alignments, blocks of 2 to
// 8, other types): norms and gated activations in float32, to be rotated and rounded by passes of their own.

#include "activation.cuh"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

constexpr int kThreads = 256;

// The same in every thread, summed in the same order every time.
__device__ float block_sum(float value) {
  __shared__ float sums[kThreads];
  __syncthreads();
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

__global__ void __launch_bounds__(kThreads)
    norm_rows_kernel(NormArgs a, int64_t rows, int64_t cols, float* y) {
  const AnyMatrix x{a.x, a.dtype, a.row_stride};
  const AnyMatrix weight{a.weight.data, a.weight.dtype, 0}, bias{a.bias.data, a.bias.dtype, 0};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float mean = 0.0f, total = 0.0f;
    if (a.center) {
      for (int64_t c = threadIdx.x; c < cols; c += kThreads) total += x.element(row, c);
      mean = block_sum(total) / cols;
      total = 0.0f;
    }
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      const float difference = x.element(row, c) - mean;
      total = fmaf(difference, difference, total);
    }
    const float rstd = rsqrtf(block_sum(total) / cols + a.eps);
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      float value = (x.element(row, c) - mean) * rstd;
      if (weight.x != nullptr) value *= weight.element(0, c);
      if (bias.x != nullptr) value += bias.element(0, c);
      y[row * cols + c] = a.col_scale != nullptr ? value * a.col_scale[c] : value;
    }
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (a.center) a.mean[row] = mean;
    }
  }
}

template <typename Act>
__global__ void __launch_bounds__(kThreads)
    gated_rows_kernel(GatedArgs a, Act activation, int64_t rows, int64_t cols, float* y) {
  const AnyMatrix gate{a.gate, a.dtype, a.gate_stride}, up{a.up, a.dtype, a.up_stride};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * cols;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / cols, c = i % cols;
    const float value = activation.value(gate.element(row, c), up.element(row, c));
    y[i] = a.col_scale != nullptr ? value * a.col_scale[c] : value;
  }
}

unsigned grid_of(int64_t blocks, int device) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, 16 * int64_t{multiprocessors(device)}));
}

}  // namespace

cudaError_t norm_rows(const NormArgs& a, int64_t rows, int64_t cols, float* y, int device,
                      cudaStream_t stream) {
  norm_rows_kernel<<<grid_of(rows, device), kThreads, 0, stream>>>(a, rows, cols, y);
  return cudaGetLastError();
}

cudaError_t gated_rows(const GatedArgs& a, int64_t rows, int64_t cols, float* y, int device,
                       cudaStream_t stream) {
  return with_activation(a.activation, [&](auto activation) {
    const unsigned grid = grid_of(ceil_div(rows * cols, kThreads), device);
    gated_rows_kernel<<<grid, kThreads, 0, stream>>>(a, activation, rows, cols, y);
    return cudaGetLastError();
  });
}

}  // namespace halo_train
