// inverse_of() and scale_of() of csrc/round.cuh against quotients by __fdiv_rn, for every magnitude there is.
//     nvcc -std=c++17 -O3 -arch=sm_90 -Icsrc csrc/tests/quotients.cu -o build/quotients && build/quotients

#include "round.cuh"
#include "sanitize.h"

namespace {

using halo_train::QType;

template <QType kType>
__device__ bool differ(uint32_t amax_bits) {
  const float amax = halo_train::floored(amax_bits), qmax = halo_train::qmax<kType>();
  const float inverse = __fdiv_rn(qmax, amax), scale = amax_bits == 0 ? 1.0f : __fdiv_rn(amax, qmax);
  return __float_as_uint(inverse) != __float_as_uint(halo_train::inverse_of<kType>(amax_bits)) ||
         __float_as_uint(scale) != __float_as_uint(halo_train::scale_of<kType>(amax_bits));
}

__global__ void compare(unsigned long long* differences) {
  for (uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < 1u << 31;
       bits += gridDim.x * blockDim.x) {
    const bool any = differ<QType::kE4M3>(bits) || differ<QType::kE5M2>(bits) || differ<QType::kInt8>(bits);
    if (any) atomicAdd(differences, 1ull);
  }
}

}  // namespace

int main() {
  unsigned long long differences = 0, *counter;
  CHECK(cudaMalloc(&counter, sizeof(differences)));
  CHECK(cudaMemset(counter, 0, sizeof(differences)));
  compare<<<2048, 256>>>(counter);
  CHECK(cudaMemcpy(&differences, counter, sizeof(differences), cudaMemcpyDeviceToHost));
  std::printf("%llu of %u magnitudes differ\n", differences, 1u << 31);
  return differences != 0;
}
