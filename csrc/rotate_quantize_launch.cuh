// Which rotate_quantize_kernel serves which block, and its launch. One translation unit for each input type
// includes this.

#pragma once

#include <cmath>

#include "occupancy.cuh"
#include "rotate_quantize_kernel.cuh"

namespace halo_train::detail {

constexpr int kRotateTile = 2048;  // elements of a warp; half of it for rows that fill no more

template <typename T, QType kType, int kLogValues, int kLogWarps, int kBlockBits, bool kGroups, bool kScaled>
cudaError_t launch_rotate(const RotateParams<T>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel =
      rotate_quantize_kernel<T, kType, kLogValues, kLogWarps, kBlockBits, kGroups, kScaled>;
  using L = RotateLayout<kLogValues, kLogWarps>;
  const size_t tiles = static_cast<size_t>(p.warps) << L::kTileBits;
  const size_t shared = (L::kExchange ? sizeof(float) * tiles : 0) + (!kScaled       ? 0
                                                                      : L::kExchange ? tiles
                                                                                     : 2 * tiles);
  int blocks = 0;
  const cudaError_t error = resident_blocks<kKernel>(device, p.warps, shared, blocks);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(p.rows, blocks));
  kKernel<<<grid, 32 * p.warps, shared, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, QType kType, bool kScaled>
cudaError_t rotate_sized(RotateParams<T>& p, int device, cudaStream_t stream) {
  if (p.cols <= kRotateTile / 2) {
    p.warps = 1;
    return launch_rotate<T, kType, 5, 0, 0, false, kScaled>(p, device, stream);
  }
  p.warps = (p.cols + kRotateTile - 1) / kRotateTile;
  switch (p.log_block) {
    case 8:
      return launch_rotate<T, kType, 6, 0, 8, false, kScaled>(p, device, stream);
    case 9:
      return launch_rotate<T, kType, 6, 0, 9, false, kScaled>(p, device, stream);
    case 10:
      return launch_rotate<T, kType, 6, 0, 10, false, kScaled>(p, device, stream);
    case 11:
      return launch_rotate<T, kType, 6, 0, 11, false, kScaled>(p, device, stream);
    case 12:
      return p.warps == 2 ? launch_rotate<T, kType, 6, 1, 0, false, kScaled>(p, device, stream)
                          : launch_rotate<T, kType, 6, 1, 0, true, kScaled>(p, device, stream);
    case 13:
      return launch_rotate<T, kType, 6, 2, 0, true, kScaled>(p, device, stream);
    case 14:
      return launch_rotate<T, kType, 6, 3, 0, false, kScaled>(p, device, stream);
    case 15:
      return launch_rotate<T, kType, 6, 4, 0, false, kScaled>(p, device, stream);
    default:
      return launch_rotate<T, kType, 6, 0, 7, false, kScaled>(p, device, stream);
  }
}

template <typename T>
cudaError_t launch_rotate_quantize(const QuantizeRowsArgs& a, int block, cudaStream_t stream) {
  RotateParams<T> p{};
  p.x = static_cast<const T*>(a.x);
  p.rows = a.rows;
  p.row_stride = a.row_stride;
  p.cols = static_cast<int>(a.cols);
  while (1 << p.log_block < block) ++p.log_block;
  p.col_scale = a.col_scale;
  p.q = static_cast<uint8_t*>(a.q);
  p.scale = a.scale;
  p.tensor_amax = a.tensor_amax;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  if (a.qtype == QType::kInt8) {
    return a.col_scale == nullptr ? rotate_sized<T, QType::kInt8, false>(p, a.device, stream)
                                  : rotate_sized<T, QType::kInt8, true>(p, a.device, stream);
  }
  return a.col_scale == nullptr ? rotate_sized<T, QType::kE4M3, false>(p, a.device, stream)
                                : rotate_sized<T, QType::kE4M3, true>(p, a.device, stream);
}

}  // namespace halo_train::detail
