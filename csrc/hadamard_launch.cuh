// The configuration table of the Hadamard kernels and the launch. One translation unit for each type includes
// this.

#pragma once

#include <algorithm>
#include <atomic>

#include "hadamard.h"
#include "hadamard_kernel.cuh"
#include "hadamard_pair.cuh"
#include "hadamard_products.cuh"
#include "occupancy.cuh"

namespace halo_train::detail {

// More than 48 KB of shared memory has to be asked for, once for each kernel and device.
template <auto kKernel, size_t kBytes>
cudaError_t allow_shared(int device) {
  if constexpr (kBytes <= 48 * 1024) {
    return cudaSuccess;
  } else {
    static std::atomic<bool> done[kCachedDevices];
    const bool cached = device < kCachedDevices;
    if (cached && done[device].load(std::memory_order_relaxed)) return cudaSuccess;
    int limit = 0;
    cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    if (static_cast<size_t>(limit) < kBytes) return cudaErrorLaunchOutOfResources;
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes));
    if (error == cudaSuccess && cached) done[device].store(true, std::memory_order_relaxed);
    return error;
  }
}

template <typename L>
cudaError_t launch_warps(const HadamardParams<typename L::T>& p, cudaStream_t stream) {
  constexpr int kThreads =
      128;  // 64 are limited by the rate at which thread blocks start, 256 by waiting for each other
  constexpr int64_t kElements = int64_t{kThreads / 32} << L::kWarpBit;
  const int64_t grid = (p.total + kElements - 1) / kElements;
  if (p.out_scale != nullptr) {
    hadamard_warp<L, kThreads, true><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p);
  } else {
    hadamard_warp<L, kThreads, false><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_256(const HadamardParams<T>& p, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const unsigned grid = static_cast<unsigned>((p.total / 8 + kThreads - 1) / kThreads);
  if (p.out_scale != nullptr) {
    hadamard_warp_256<T, kThreads, true><<<grid, kThreads, 0, stream>>>(p);
  } else {
    hadamard_warp_256<T, kThreads, false><<<grid, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

// kGroups tasks in a thread block; kMinBlocks thread blocks on a multiprocessor have to fit its registers
// (ptxas ignores that, with a warning, on GPUs that allow fewer). kAhead: tasks for every ten multiprocessors
// by which the L2 cache runs ahead of the loads, where not all start at once.
template <typename L, int kGroups, int kMinBlocks, int kAhead, bool kFactors>
cudaError_t launch_tasks(const HadamardParams<typename L::T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = hadamard_block<L, kGroups, kMinBlocks, false, kFactors>;
  constexpr size_t kShared = L::kSharedBytes * kGroups;
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, kShared>(device);
  if (error != cudaSuccess) return error;
  const int64_t grid = ((p.total >> L::kLogN) + kGroups - 1) / kGroups;
  const uint32_t ahead = grid > int64_t{count} * kMinBlocks ? count * kAhead / 10 : 0;
  kKernel<<<static_cast<unsigned>(grid), 32 * L::kWarps * kGroups, kShared, stream>>>(p, ahead);
  return cudaGetLastError();
}

// The same with factors and without.
template <typename L, int kGroups, int kMinBlocks, int kAhead>
cudaError_t launch_blocks(const HadamardParams<typename L::T>& p, int device, cudaStream_t stream) {
  // Factors need registers of their own.
  constexpr int kFewer = kMinBlocks >= 16 ? kMinBlocks * 3 / 4 : kMinBlocks;
  return p.out_scale != nullptr ? launch_tasks<L, kGroups, kFewer, kAhead, true>(p, device, stream)
                                : launch_tasks<L, kGroups, kMinBlocks, kAhead, false>(p, device, stream);
}

// One thread block on a multiprocessor, which works through many tasks.
template <typename L, bool kFactors = false>
cudaError_t launch_staying(const HadamardParams<typename L::T>& p, int device, cudaStream_t stream) {
  if constexpr (!kFactors) {
    if (p.out_scale != nullptr) return launch_staying<L, true>(p, device, stream);
  }
  constexpr auto kKernel = hadamard_block<L, 1, 1, true, kFactors>;
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, L::kSharedBytes>(device);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(p.total >> L::kLogN, count));
  kKernel<<<grid, 32 * L::kWarps, L::kSharedBytes, stream>>>(p, 0);
  return cudaGetLastError();
}

// Blocks of 32768 float32 values by pairs of thread blocks, on Hopper and later. kAhead as above, of halves.
inline bool has_pairs(int device) {
  static std::atomic<int> known[kCachedDevices];
  const bool cached = device < kCachedDevices;
  int major = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (major == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
      return false;
    if (cached) known[device].store(major, std::memory_order_relaxed);
  }
  return major >= 9;
}

template <int kAhead, bool kFactors = false>
cudaError_t launch_pairs(const HadamardParams<float>& p, int device, cudaStream_t stream) {
  if constexpr (!kFactors) {
    if (p.out_scale != nullptr) return launch_pairs<kAhead, true>(p, device, stream);
  }
  constexpr auto kKernel = hadamard_pair<kFactors>;
  const cudaError_t error = allow_shared<kKernel, PairLayout::kPairBytes>(device);
  if (error != cudaSuccess) return error;
  const int count = multiprocessors(device);
  const int64_t halves = p.total >> PairLayout::kLogN;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(halves));
  config.blockDim = dim3(PairLayout::kThreads);
  config.dynamicSmemBytes = PairLayout::kPairBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const uint32_t ahead = halves > int64_t{2} * count ? count * kAhead / 10 : 0;
  return cudaLaunchKernelEx(&config, kKernel, p, ahead);
}

// Whether large blocks are better halved (see kLogParts): with fewer than `few` halves of a block for each
// multiprocessor, or where a GPU has too little shared memory for a whole one. Halves cannot work in place.
template <typename Whole>
bool halved(const HadamardParams<typename Whole::T>& p, int device, int few) {
  const int count = multiprocessors(device);
  int shared = 0;
  if (p.x == p.y ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return false;
  }
  return p.total >> (Whole::kLogN - 1) < int64_t{few} * count ||
         static_cast<size_t>(shared) < Whole::kSharedBytes;
}

// The table, measured on an H200 (benchmarks/bench_hadamard.py). What decides: 32 to 64 KB of loads in flight
// on each multiprocessor (less leaves the memory idle, more makes reads and writes collide in it), the fewest
// shuffles, and as many thread blocks side by side as registers allow, since one that waits at a barrier
// needs others to cover for it.
template <typename T>
cudaError_t launch_sized(const HadamardParams<T>& p, int device, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    switch (p.log_block) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
        return launch_warps<HadamardLayout<T, 4, 3>>(p, stream);
      case 5:
        return launch_warps<HadamardLayout<T, 5, 3>>(p, stream);
      case 6:
        return launch_warps<HadamardLayout<T, 6, 3>>(p, stream);
      case 7:
        return launch_warps<HadamardLayout<T, 7, 3>>(p, stream);
      case 8:
        return launch_256(p, stream);
      case 9:
        return launch_blocks<HadamardLayout<T, 9, 4, 0, true>, 4, 10, 320>(p, device, stream);
      case 10:
        return launch_blocks<HadamardLayout<T, 10, 4, 0>, 1, 32, 160>(p, device, stream);
      case 11:
        if (p.out_scale != nullptr) {
          return launch_tasks<HadamardLayout<T, 11, 5, 0>, 1, 12, 80, true>(p, device, stream);
        }
        return launch_tasks<HadamardLayout<T, 11, 4, 0>, 1, 16, 80, false>(p, device, stream);
      case 12:
        return launch_blocks<HadamardLayout<T, 12, 5, 0, true>, 1, 8, 45>(p, device, stream);
      case 13:
        if (p.out_scale != nullptr) {
          return launch_tasks<HadamardLayout<T, 13, 6, 0, true>, 1, 4, 30, true>(p, device, stream);
        }
        return launch_tasks<HadamardLayout<T, 13, 5, 0, true>, 1, 4, 30, false>(p, device, stream);
      case 14: {
        using Whole = HadamardLayout<T, 14, 6, 0, false, 0, true>;
        if (halved<Whole>(p, device, 4)) {
          return launch_blocks<HadamardLayout<T, 13, 5, 0, false, 1>, 1, 4, 0>(p, device, stream);
        }
        return launch_blocks<Whole, 1, 3, 20>(p, device, stream);
      }
      case 15: {
        using Whole = HadamardLayout<T, 15, 6, 1, false, 0, true>;
        if (halved<Whole>(p, device, 4)) {
          return launch_blocks<HadamardLayout<T, 14, 6, 0, false, 1>, 1, 2, 10>(p, device, stream);
        }
        return launch_staying<Whole>(p, device, stream);
      }
    }
  } else {
    switch (p.log_block) {
      case 0:
      case 1:
      case 2:
      case 3:
      case 4:
      case 5:
        return launch_warps<HadamardLayout<T, 5, 2>>(p, stream);
      case 6:
        return launch_warps<HadamardLayout<T, 6, 2>>(p, stream);
      case 7:
        return launch_warps<HadamardLayout<T, 7, 2>>(p, stream);
      case 8:
        return launch_warps<HadamardLayout<T, 8, 3>>(p, stream);
      case 9:
        return launch_blocks<HadamardLayout<T, 9, 3>, 2, 1, 0>(p, device, stream);
      case 10:
        return launch_blocks<HadamardLayout<T, 10, 4>, 1, 1, 0>(p, device, stream);
      case 11:
        return launch_blocks<HadamardLayout<T, 11, 4>, 1, 1, 40>(p, device, stream);
      case 12:
        return launch_blocks<HadamardLayout<T, 12, 4>, 1, 1, 40>(p, device, stream);
      case 13:
        return launch_blocks<HadamardLayout<T, 13, 5>, 1, 1, 20>(p, device, stream);
      case 14:
        return launch_blocks<HadamardLayout<T, 14, 5, 2, false, 0, false, true>, 1, 2, 10>(p, device, stream);
      case 15:
        if (has_pairs(device)) return launch_pairs<8>(p, device, stream);
        if (halved<HadamardLayout<T, 15, 5>>(p, device, 1)) {
          return launch_blocks<HadamardLayout<T, 14, 5, 2, false, 1>, 1, 1, 0>(p, device, stream);
        }
        return launch_blocks<HadamardLayout<T, 15, 5>, 1, 1, 8>(p, device, stream);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_hadamard(const HadamardArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  HadamardParams<T> p;
  p.x = static_cast<const T*>(args.x);
  p.y = static_cast<T*>(args.y);
  p.signs = static_cast<const T*>(args.signs);
  p.out_scale = static_cast<const float*>(args.out_scale);
  p.total = args.total;
  p.row_stride = args.row_stride;
  p.axis = static_cast<uint32_t>(args.axis / kVector);
  p.split = args.signs != nullptr || args.row_stride != args.axis;
  p.scale = static_cast<float>(args.scale);
  p.log_block = 0;
  while (1 << p.log_block < args.block) ++p.log_block;
  return launch_sized(p, args.device, stream);
}

}  // namespace halo_train::detail
