// What the fused kernels of rotate_quantize_kernel.cuh do not take (odd widths and alignments, blocks of 2 to
// 8, other types): norms and gated activations in float32, to be rotated and rounded by passes of their own.

#include "activation.cuh"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

constexpr int kThreads = 256;

__device__ __forceinline__ float element(const Vector& v, int64_t i) {
  if (v.dtype == DType::kFloat32) return static_cast<const float*>(v.data)[i];
  return v.dtype == DType::kBFloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[i])
                                     : __half2float(static_cast<const __half*>(v.data)[i]);
}

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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    norm_rows_kernel(NormArgs a, int64_t rows, int64_t cols, float* y) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.row_stride;
    float mean = 0.0f, total = 0.0f;
    if (a.center) {
      for (int64_t c = threadIdx.x; c < cols; c += kThreads) total += static_cast<float>(x[c]);
      mean = block_sum(total) / cols;
      total = 0.0f;
    }
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      const float difference = static_cast<float>(x[c]) - mean;
      total = fmaf(difference, difference, total);
    }
    const float rstd = rsqrtf(block_sum(total) / cols + a.eps);
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      float value = (static_cast<float>(x[c]) - mean) * rstd;
      if (a.weight.data != nullptr) value *= element(a.weight, c);
      if (a.bias.data != nullptr) value += element(a.bias, c);
      y[row * cols + c] = a.col_scale != nullptr ? value * a.col_scale[c] : value;
    }
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (a.center) a.mean[row] = mean;
    }
  }
}

template <typename T, typename Act>
__global__ void __launch_bounds__(kThreads)
    gated_rows_kernel(GatedArgs a, Act activation, int64_t rows, int64_t cols, float* y) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * cols;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / cols, c = i % cols;
    const float gate = static_cast<float>(static_cast<const T*>(a.gate)[row * a.gate_stride + c]);
    const float up = static_cast<float>(static_cast<const T*>(a.up)[row * a.up_stride + c]);
    const float value = activation.value(gate) * up;
    y[i] = a.col_scale != nullptr ? value * a.col_scale[c] : value;
  }
}

unsigned grid_of(int64_t blocks, int device) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, 16 * int64_t{multiprocessors(device)}));
}

}  // namespace

cudaError_t norm_rows(const NormArgs& a, int64_t rows, int64_t cols, float* y, int device,
                      cudaStream_t stream) {
  return dispatch(a.dtype, QType::kE4M3, [&](auto input, auto) {
    using T = typename decltype(input)::type;
    norm_rows_kernel<T><<<grid_of(rows, device), kThreads, 0, stream>>>(a, rows, cols, y);
    return cudaGetLastError();
  });
}

cudaError_t gated_rows(const GatedArgs& a, int64_t rows, int64_t cols, float* y, int device,
                       cudaStream_t stream) {
  return dispatch(a.dtype, QType::kE4M3, [&](auto input, auto) {
    using T = typename decltype(input)::type;
    const auto launch = [&](auto activation) {
      gated_rows_kernel<T><<<grid_of(ceil_div(rows * cols, kThreads), device), kThreads, 0, stream>>>(
          a, activation, rows, cols, y);
      return cudaGetLastError();
    };
    return a.activation == Activation::kGelu ? launch(ErfActivation::of(a.activation))
                                             : launch(SigmoidActivation::of(a.activation));
  });
}

}  // namespace halo_train
