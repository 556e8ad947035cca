// Addresses of shared memory as instructions want them that are written out here, what orders accesses to it,
// and waiting for what it is told to count.

#pragma once

#include <cstdint>

namespace halo_train::detail {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Between accesses to shared memory and bulk copies into or from the same.
__device__ __forceinline__ void order_before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Until what the barrier at this address counts has come, in a phase of this parity.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t"
        ".reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
#endif
}

}  // namespace halo_train::detail
