// Addresses of shared memory as instructions want them that are written out here.

#pragma once

#include <cstdint>

namespace halo_train::detail {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace halo_train::detail
