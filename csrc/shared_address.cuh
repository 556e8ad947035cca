// Addresses of shared memory as instructions want them that are written out here, and what orders accesses to
// it.

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

}  // namespace halo_train::detail
