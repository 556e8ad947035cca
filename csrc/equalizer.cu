#include <cmath>

#include "quantize.h"

namespace halo_train {
namespace {

__global__ void equalizer_factors_kernel(const int8_t* exponent, float* d, float* inverse, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  d[i] = ldexpf(1.0f, exponent[i]);
  inverse[i] = ldexpf(1.0f, -exponent[i]);
}

}  // namespace

cudaError_t equalizer_factors(const int8_t* exponent, float* d, float* inverse, int64_t n,
                              cudaStream_t stream) {
  constexpr int kThreads = 256;
  equalizer_factors_kernel<<<static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      exponent, d, inverse, n);
  return cudaGetLastError();
}

}  // namespace halo_train
