// How many thread blocks of a kernel run at once, for kernels whose thread blocks stay and stride over the
// rows. Asked of the driver once for each kernel, device and size: a launch makes no other calls.

#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace halo_train::detail {

constexpr int kCachedDevices = 64;

inline int multiprocessors(int device) {
  static std::atomic<int> known[kCachedDevices];
  const bool cached = device < kCachedDevices;
  int count = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  if (cached) known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Bytes of shared memory that a thread block can ask for, a little less for what kernels declare themselves.
inline size_t shared_limit(int device) {
  static std::atomic<int> known[kCachedDevices];
  const bool cached = device < kCachedDevices;
  int limit = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (limit == 0) {
    if (cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
      return 47 * 1024;
    }
    if (cached) known[device].store(limit, std::memory_order_relaxed);
  }
  return static_cast<size_t>(limit) - 1024;
}

// Thread blocks of `threads` threads and `shared` bytes of dynamic shared memory that fit the GPU at once, in
// `blocks`; both are functions of `key`, at most 32. Allows the shared memory; cudaErrorLaunchOutOfResources
// where the GPU has too little.
template <auto kKernel>
cudaError_t resident_blocks(int device, int key, int threads, size_t shared, int& blocks) {
  static std::atomic<int> known[kCachedDevices][33];
  const bool cached = device < kCachedDevices;
  blocks = cached ? known[device][key].load(std::memory_order_relaxed) : 0;
  if (blocks > 0) return cudaSuccess;
  int limit = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kKernel);
  if (error != cudaSuccess) return error;
  limit -= static_cast<int>(attributes.sharedSizeBytes);
  if (static_cast<int64_t>(shared) > limit) return cudaErrorLaunchOutOfResources;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  int on_one = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_one, kKernel, threads, shared);
  if (error != cudaSuccess) return error;
  if (on_one == 0) return cudaErrorLaunchOutOfResources;
  blocks = on_one * multiprocessors(device);
  if (cached) known[device][key].store(blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace halo_train::detail
