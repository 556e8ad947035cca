// The configuration table of the kernels for blocks of m 2^k and their launch. One translation unit for each
// type includes this.

#pragma once

#include "hadamard_launch.cuh"
#include "hadamard_matrix.cuh"
#include "hadamard_matrix_staying.cuh"

namespace halo_train::detail {

// kMinBlocks thread blocks on a multiprocessor have to fit its registers; kAhead: blocks for every ten
// multiprocessors by which the L2 cache runs ahead of the loads.
template <typename L, int kMinBlocks, int kAhead, bool kFactors = false>
cudaError_t launch_matrix(const MatrixParams<typename L::T>& p, int device, cudaStream_t stream) {
  if constexpr (!kFactors) {
    if (p.out_scale != nullptr) return launch_matrix<L, kMinBlocks, kAhead, true>(p, device, stream);
  }
  constexpr auto kKernel = hadamard_matrix<L, kMinBlocks, kFactors>;
  constexpr size_t kMost = L::shared_bytes(16 * L::kTiles);
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, kMost>(device);
  if (error != cudaSuccess) return error;
  const size_t shared = L::shared_bytes(p.order);
  const int64_t grid = (p.blocks + L::kGroups - 1) / L::kGroups;
  kKernel<<<static_cast<unsigned>(grid), L::kThreads * L::kGroups, shared, stream>>>(
      p, int64_t{count} * kAhead / 10);
  return cudaGetLastError();
}

template <typename L, bool kColumnwise = false>
cudaError_t launch_staying_matrix(const MatrixParams<typename L::T>& p, int device, cudaStream_t stream) {
  if constexpr (!kColumnwise) {
    if (p.signs != nullptr || p.out_scale != nullptr) {
      return launch_staying_matrix<L, true>(p, device, stream);
    }
  }
  // 64 values of a thread take up to 128 registers.
  constexpr auto kKernel = hadamard_matrix_staying<L, 512 / L::kThreads, kColumnwise>;
  int resident = 0;
  const cudaError_t error = resident_blocks<kKernel>(device, 0, L::kThreads, L::kSharedBytes, resident);
  if (error != cudaSuccess) return error;
  int64_t grid = std::min<int64_t>(p.blocks, resident);
  // A thread block that stays in its columns reads the signs once.
  if (grid > p.per_row) grid -= grid % p.per_row;
  kKernel<<<static_cast<unsigned>(grid), L::kThreads, L::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

// Whether thread blocks stay that would otherwise be handed out, `places` of them on a multiprocessor. Signs
// are as many bytes as a block. Those of 28 rows and more have no room in what such blocks leave of the L1
// cache, so they come from the L2 cache for every block, where thread blocks that stay read them once.
// Measured on an H200: that decides from about four blocks for each place on.
template <typename S>
bool signs_stay(const MatrixParams<typename S::T>& p, int device, int places) {
  return p.signs != nullptr && p.out_scale == nullptr && p.order > 24 &&
         p.blocks > int64_t{4} * places * multiprocessors(device) && S::kSharedBytes <= shared_limit(device);
}

template <typename T, int kTiles>
cudaError_t launch_power(const MatrixParams<T>& p, int log_power, int device, cudaStream_t stream) {
  // Measured on an H200. As many thread blocks side by side as registers and shared memory allow, and the L2
  // cache ahead by about as many bytes. Thread blocks that the hardware hands out beat those that stay, which
  // wait for the slowest multiprocessor. Only where one fills a multiprocessor (more than 48 rows of
  // 512 columns) does it always stay.
  constexpr int kResident = kTiles == 1 ? 8 : kTiles == 2 ? 7 : 4;
  switch (log_power) {
    case 6:
      return launch_matrix<MatrixLayout<T, kTiles, 6, 4>, kResident, 80>(p, device, stream);
    case 7:
      if constexpr (kTiles == 3) return launch_matrix<MatrixLayout<T, 3, 7, 1>, 8, 40>(p, device, stream);
      return launch_matrix<MatrixLayout<T, kTiles, 7, 2>, kResident,
                           kTiles == 1   ? 80
                           : kTiles == 2 ? 90
                                         : 40>(p, device, stream);
    case 8:
      return launch_matrix<MatrixLayout<T, kTiles, 8, 1>, kResident,
                           kTiles == 1   ? 80
                           : kTiles == 2 ? 40
                           : kTiles == 3 ? 30
                                         : 20>(p, device, stream);
    case 9:
      if constexpr (kTiles <= 2) {
        if constexpr (kTiles == 2) {
          using Staying = StayingMatrixLayout<T, 2, 9>;
          if (signs_stay<Staying>(p, device, 4))
            return launch_staying_matrix<Staying, true>(p, device, stream);
        }
        return launch_matrix<MatrixLayout<T, kTiles, 9, 1, 7>, 4, kTiles == 1 ? 40 : 20>(p, device, stream);
      } else if constexpr (kTiles == 3) {
        return launch_matrix<MatrixLayout<T, 3, 9, 1>, 2, 15>(p, device, stream);
      } else {
        return launch_staying_matrix<StayingMatrixLayout<T, kTiles, 9>>(p, device, stream);
      }
    case 10:
      if constexpr (kTiles == 2) {
        using Staying = StayingMatrixLayout<T, 2, 10>;
        if (signs_stay<Staying>(p, device, 2)) return launch_staying_matrix<Staying, true>(p, device, stream);
        return launch_matrix<MatrixLayout<T, 2, 10, 1, 7>, 2, 10>(p, device, stream);
      }
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_hadamard_matrix(const HadamardArgs& args, cudaStream_t stream) {
  MatrixParams<T> p;
  p.x = static_cast<const T*>(args.x);
  p.y = static_cast<T*>(args.y);
  p.signs = static_cast<const T*>(args.signs);
  p.out_scale = static_cast<const float*>(args.out_scale);
  p.matrix = static_cast<const T*>(args.matrix);
  p.order = args.order;
  p.blocks = args.total / args.block;
  p.row_stride = args.row_stride;
  p.per_row = static_cast<uint32_t>(args.axis / args.block);
  p.split = args.signs != nullptr || args.out_scale != nullptr || args.row_stride != args.axis;
  p.scale = static_cast<float>(args.scale);
  int log_power = 0;
  while (args.order << log_power < args.block) ++log_power;
  switch ((args.order + 15) / 16) {
    case 1:
      return launch_power<T, 1>(p, log_power, args.device, stream);
    case 2:
      return launch_power<T, 2>(p, log_power, args.device, stream);
    case 3:
      return launch_power<T, 3>(p, log_power, args.device, stream);
    case 4:
      return launch_power<T, 4>(p, log_power, args.device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train::detail
