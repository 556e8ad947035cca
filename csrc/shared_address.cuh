// Addresses of shared memory as instructions want them that are written out here, what orders accesses to it,
// barriers in it, which count, and copies that they count. Empty before Hopper, where nobody calls them.

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

// The barrier at this address counts so many arrivals. Followed by a fence or a barrier of all who use it.
__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}
// Makes it known to those who make copies.
__device__ __forceinline__ void show_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// An arrival, and so many bytes that have to come in the same phase.
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
// So many bytes, a multiple of 16, from memory to shared memory at address `to`; both aligned likewise.
__device__ __forceinline__ void copy_to_shared(uint32_t to, const void* from, uint32_t bytes,
                                               uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
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
