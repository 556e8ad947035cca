// Words from one thread block of a cluster to the shared memory of the others. Empty before Hopper.

#pragma once

#include "shared_address.cuh"

namespace halo_train::detail {

// Says to the cluster that this thread has come so far, which wait_for_cluster() of all others waits for.
__device__ __forceinline__ void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
// Maxima go to the thread blocks of a cluster as stores that their barriers count: barriers of the cluster
// with fences would wait for every access to memory and empty the L1 cache.
__device__ __forceinline__ void expect_in_cluster(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = shared_address(barrier);
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  __syncwarp();  // the compiler lets any lane initialise it
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#endif
  arrive_in_cluster();
}
// All thread blocks of the cluster expect something.
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// To the same place in the shared memory of thread block `rank`.
__device__ __forceinline__ void send_in_cluster(uint32_t* to, uint32_t value, uint64_t* barrier,
                                                uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .b32 to, barrier;\n\t"
      "mapa.shared::cluster.u32 to, %0, %3;\n\t"
      "mapa.shared::cluster.u32 barrier, %2, %3;\n\t"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [barrier];\n\t"
      "}" ::"r"(shared_address(to)),
      "r"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}
// So many bytes of this thread block's shared memory, a multiple of 16, which it must keep until they have
// arrived, to `to` in that of thread block `rank`. Follows a proxy fence of those who wrote them.
__device__ __forceinline__ void copy_in_cluster(const void* to, const void* from, uint32_t bytes,
                                                uint64_t* barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .b32 to, barrier;\n\t"
      "mapa.shared::cluster.u32 to, %0, %4;\n\t"
      "mapa.shared::cluster.u32 barrier, %3, %4;\n\t"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%1], %2, [barrier];\n\t"
      "}" ::"r"(shared_address(to)),
      "r"(shared_address(from)), "r"(bytes), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}
// What is expected has come.
__device__ __forceinline__ void wait_for_all(uint64_t* barrier) {
  wait_for_phase(shared_address(barrier), 0);
}

}  // namespace halo_train::detail
