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
  constexpr size_t kMost = sizeof(float) * L::kGroups * L::kSlabs * L::slab_words(16 * L::kTiles);
  const int count = multiprocessors(device);
  const cudaError_t error = allow_shared<kKernel, kMost>(device);
  if (error != cudaSuccess) return error;
  const size_t shared = sizeof(float) * L::kGroups * L::kSlabs * L::slab_words(p.order);
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

template <typename T, int kTiles>
cudaError_t launch_power(const MatrixParams<T>& p, int log_power, int device, cudaStream_t stream) {
  // Measured on an H200. As many thread blocks side by side as registers allow.
  constexpr int kResident = kTiles == 1 ? 8 : kTiles == 2 ? 7 : 4;
  constexpr int kAhead = kTiles == 1 ? 80 : kTiles == 2 ? 50 : 40;
  switch (log_power) {
    case 6:
      return launch_matrix<MatrixLayout<T, kTiles, 6, 4>, kResident, kAhead>(p, device, stream);
    case 7:
      if constexpr (kTiles == 3) return launch_matrix<MatrixLayout<T, 3, 7, 1>, 8, kAhead>(p, device, stream);
      return launch_matrix<MatrixLayout<T, kTiles, 7, 2>, kResident, kTiles == 2 ? 60 : kAhead>(p, device,
                                                                                                stream);
    case 8:
      return launch_matrix<MatrixLayout<T, kTiles, 8, 1>, kResident, kAhead>(p, device, stream);
    case 9:
      return launch_staying_matrix<StayingMatrixLayout<T, kTiles, 9>>(p, device, stream);
    case 10:
      if constexpr (kTiles == 2) {
        return launch_staying_matrix<StayingMatrixLayout<T, kTiles, 10>>(p, device, stream);
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
