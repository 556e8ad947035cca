// The configuration table of the kernels for two rounds and their launch. One translation unit for each type
// includes this.

#pragma once

#include "hadamard_launch.cuh"
#include "hadamard_rounds.cuh"
#include "hadamard_rounds_products.cuh"

namespace halo_train::detail {

template <typename L>
cudaError_t launch_rounds_warp(const RoundsParams<typename L::T>& p, cudaStream_t stream) {
  constexpr int kThreads = 128;
  constexpr int64_t kElements = int64_t{kThreads / 32} << L::kWarpBit;
  const int64_t grid = (p.total + kElements - 1) / kElements;
  hadamard_rounds_warp<L, kThreads><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// kGroups, kMinBlocks and kAhead as in launch_blocks.
template <typename R, int kGroups, int kMinBlocks, int kAhead>
cudaError_t launch_rounds(const RoundsParams<typename R::T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = hadamard_rounds<R, kGroups, kMinBlocks>;
  constexpr size_t kShared = sizeof(float) * R::kWords * kGroups;
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, kShared>(device);
  if (error != cudaSuccess) return error;
  const int64_t grid = ((p.total >> R::kLogN) + kGroups - 1) / kGroups;
  const int64_t ahead = grid > int64_t{count} * kMinBlocks ? int64_t{count} * kAhead / 10 : 0;
  kKernel<<<static_cast<unsigned>(grid), 32 * R::L::kWarps * kGroups, kShared, stream>>>(p, ahead);
  return cudaGetLastError();
}

template <typename L, int kMinBlocks, int kAhead>
cudaError_t launch_products(const RoundsParams<typename L::T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = hadamard_rounds_products<L, kMinBlocks>;
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, L::kSharedBytes>(device);
  if (error != cudaSuccess) return error;
  const int64_t grid = p.total >> L::kLogN, columns = p.axis >> (L::kLogN - 3);
  const int64_t ahead = grid > int64_t{count} * kMinBlocks ? int64_t{count} * kAhead / 10 / columns : 0;
  kKernel<<<static_cast<unsigned>(grid), 32 * L::kWarps, L::kSharedBytes, stream>>>(p, grid / columns, ahead);
  return cudaGetLastError();
}

template <typename L>
cudaError_t launch_rounds_staying(const RoundsParams<typename L::T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = hadamard_rounds_staying<L>;
  constexpr size_t kNext = (sizeof(typename L::T) << L::kLogN) + sizeof(uint64_t);  // and its barrier
  // Before Hopper the next block does not wait in shared memory.
  const bool small = shared_limit(device) < L::kSharedBytes + kNext;
  const cudaError_t error = small ? allow_shared<kKernel, L::kSharedBytes>(device)
                                  : allow_shared<kKernel, L::kSharedBytes + kNext>(device);
  if (error != cudaSuccess) return error;
  const int64_t grid = std::min(p.total >> L::kLogN, int64_t{multiprocessors(device)});
  const size_t shared = L::kSharedBytes + (small ? 0 : kNext);
  kKernel<<<static_cast<unsigned>(grid), 32 * L::kWarps, shared, stream>>>(p);
  return cudaGetLastError();
}

// Measured on an H200 (benchmarks/bench_hadamard.py).
template <typename T>
cudaError_t launch_rounds_sized(const RoundsParams<T>& p, int log_block, int device, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    switch (log_block) {
      case 6:
        return launch_rounds_warp<HadamardLayout<T, 6, 3>>(p, stream);
      case 7:
        return launch_rounds_warp<HadamardLayout<T, 7, 3>>(p, stream);
      case 8:
        return launch_rounds_warp<HadamardLayout<T, 8, 4>>(p, stream);
      case 9:
        return launch_rounds<RoundsLayout<T, 9, 4, 0, true>, 4, 8, 0>(p, device, stream);
      case 10:
        return launch_products<ProductsLayout<T, 10, 5, true>, 24, 120>(p, device, stream);
      case 11:
        return launch_products<ProductsLayout<T, 11, 6, true>, 14, 80>(p, device, stream);
      case 12:  // products: 2 to 4% slower
        return launch_rounds<RoundsLayout<T, 12, 6, 0, true>, 1, 8, 45>(p, device, stream);
      case 13:
        return launch_products<ProductsLayout<T, 13, 6>, 4, 15>(p, device, stream);
      case 14:
        return launch_products<ProductsLayout<T, 14, 6>, 2, 10>(p, device, stream);
      case 15:
        return launch_rounds_staying<ProductsLayout<T, 15, 7>>(p, device, stream);
    }
  } else {
    switch (log_block) {
      case 6:
        return launch_rounds_warp<HadamardLayout<T, 6, 2>>(p, stream);
      case 7:
        return launch_rounds_warp<HadamardLayout<T, 7, 2>>(p, stream);
      case 8:
        return launch_rounds_warp<HadamardLayout<T, 8, 3>>(p, stream);
      case 9:
        return launch_rounds<RoundsLayout<T, 9, 4>, 4, 1, 0>(p, device, stream);
      case 10:
        return launch_rounds<RoundsLayout<T, 10, 5>, 4, 1, 0>(p, device, stream);
      case 11:
        return launch_rounds<RoundsLayout<T, 11, 5>, 2, 1, 40>(p, device, stream);
      case 12:
        return launch_rounds<RoundsLayout<T, 12, 5>, 1, 4, 40>(p, device, stream);
      case 13:
        return launch_rounds<RoundsLayout<T, 13, 5>, 1, 3, 20>(p, device, stream);
      case 14:
        return launch_rounds<RoundsLayout<T, 14, 6>, 1, 2, 15>(p, device, stream);
      case 15:
        return launch_rounds<RoundsLayout<T, 15, 6>, 1, 1, 8>(p, device, stream);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_hadamard_rounds(const HadamardRoundsArgs& args, cudaStream_t stream) {
  RoundsParams<T> p;
  p.x = static_cast<const T*>(args.x);
  p.y = static_cast<T*>(args.y);
  p.first = args.first;
  p.middle = args.middle;
  p.last = args.last;
  p.total = args.total;
  p.row_stride = args.row_stride;
  p.axis = static_cast<uint32_t>(args.axis / static_cast<int64_t>(16 / sizeof(T)));
  p.split = args.row_stride != args.axis || args.axis != args.block;
  p.scale = args.scale;
  int log_block = 0;
  while (1 << log_block < args.block) ++log_block;
  return launch_rounds_sized(p, log_block, args.device, stream);
}

}  // namespace halo_train::detail
