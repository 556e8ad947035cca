// Which rotate_quantize_kernel serves which block, and its launch. One translation unit for each source
// includes this.

#pragma once

#include <cmath>

#include "occupancy.cuh"
#include "rotate_quantize_kernel.cuh"
#include "rotate_quantize_relay.cuh"

namespace halo_train::detail {

constexpr int kRotateTile = 2048;  // elements of a warp; half of it for rows that fill no more

// As many rows at once as threads and memory allow, then as many stages; a stage that has no room takes turns
// with the exchange. False where a row does not fit.
template <typename Shared, typename Source>
bool fit_rows(RotateParams<Source>& p, size_t limit) {
  p.stages = Shared::kStages;
  p.rows_at_once = Shared::kGrouped ? kMaxRowWarps / p.warps : 1;
  const auto fits = [&] { return Shared::bytes(p.warps, p.rows_at_once, p.stages, p.shared_stage) <= limit; };
  if (fits()) return true;
  p.stages = 1;
  while (p.rows_at_once > 1 && !fits()) --p.rows_at_once;
  if (fits()) return true;
  p.shared_stage = Shared::kStage <= Shared::kExchange;
  return fits();
}

template <typename Source, int kLogValues, int kLogWarps, int kBlockBits, bool kGroups, bool kLean = false>
cudaError_t launch_rotate(RotateParams<Source>& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = rotate_quantize_kernel<Source, kLogValues, kLogWarps, kBlockBits, kGroups, kLean>;
  using Shared = RotateShared<Source, RotatedLayout<kLogValues, kLogWarps, kBlockBits>,
                              kBlockBits != kNotRotated, kLean>;
  if (!fit_rows<Shared>(p, shared_limit(device) - 32 * sizeof(SumMatrix))) return cudaErrorNotSupported;
  const size_t shared = Shared::bytes(p.warps, p.rows_at_once, p.stages, p.shared_stage);
  const dim3 threads(32 * p.warps, p.rows_at_once);
  int blocks = 0;
  const cudaError_t error =
      resident_blocks<kKernel>(device, p.warps, static_cast<int>(threads.x * threads.y), shared, blocks);
  if (error != cudaSuccess) return error;
  const int grid = std::min((p.rows + p.rows_at_once - 1) / p.rows_at_once, blocks);
  kKernel<<<static_cast<unsigned>(grid), threads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <typename Source>
cudaError_t rotate_sized(RotateParams<Source>& p, int device, cudaStream_t stream) {
  constexpr bool kPlain = std::is_same_v<Source, PlainRows<typename Source::T, false>> ||
                          std::is_same_v<Source, PlainRows<typename Source::T, true>>;
  // Half tiles for rows that fill no more, and where the last tile would be half empty: up to five, above
  // which they wait for each other longer than that saves, as those of norms and activations do.
  const int half = kRotateTile / 2, rest = p.cols % kRotateTile;
  const bool small = p.cols <= half ||
                     (kPlain && 0 < rest && rest <= half && p.cols <= 5 * half && 1 << p.log_block <= half);
  const int tile = small ? half : kRotateTile;
  p.warps = (p.cols + tile - 1) / tile;
  if constexpr (!kPlain) {
    if (p.log_block == 0) {
      return small ? launch_rotate<Source, 5, 0, kNotRotated, false>(p, device, stream)
                   : launch_rotate<Source, 6, 0, kNotRotated, false>(p, device, stream);
    }
  }
  if (small) return launch_rotate<Source, 5, 0, 0, false>(p, device, stream);
  const auto within_tile = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    // Rows of 5 (8960 columns), 6 (11008), 9 and 10 warps (18944), of which lean ones fill more of a
    // multiprocessor. Products of sums cost them spilled registers, which 5 are not worth.
    if constexpr (kPlain && std::is_same_v<typename Source::T, __nv_bfloat16>) {
      const int more = kLeanWarps / p.warps * p.warps - kMaxRowWarps / p.warps * p.warps;
      if (more >= (kBits < 10 ? 5 : 6)) {
        return launch_rotate<Source, 6, 0, kBits, false, true>(p, device, stream);
      }
    }
    return launch_rotate<Source, 6, 0, kBits, false>(p, device, stream);
  };
  switch (p.log_block) {
    case 8:
      return within_tile(std::integral_constant<int, 8>{});
    case 9:
      return within_tile(std::integral_constant<int, 9>{});
    case 10:
      return within_tile(std::integral_constant<int, 10>{});
    case 11:
      return within_tile(std::integral_constant<int, 11>{});
    case 12:
      return p.warps == 2 ? launch_rotate<Source, 6, 1, 0, false>(p, device, stream)
                          : launch_rotate<Source, 6, 1, 0, true>(p, device, stream);
    case 13:
      return launch_rotate<Source, 6, 2, 0, true>(p, device, stream);
    case 14:
      return launch_rotate<Source, 6, 3, 0, false>(p, device, stream);
    case 15:
      return launch_rotate<Source, 6, 4, 0, false>(p, device, stream);
    default:
      return within_tile(std::integral_constant<int, 7>{});
  }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// e5m2 is for gradients, which are not rotated along their rows, and HaloLinear pads rows to multiples of 16.
template <typename Source>
cudaError_t rotate_rows(const Source& source, const RowsOutput& out, int block, uint32_t* tensor_amax,
                        cudaStream_t stream) {
  if (out.qtype == QType::kE5M2 || out.rows > 1 << 30 || out.cols > kMaxRowWarps * kRotateTile ||
      out.cols % 8 != 0 || (block > 1 && block < 16) || !aligned16(out.q)) {
    return cudaErrorNotSupported;
  }
  RotateParams<Source> p{};
  p.source = source;
  p.rows = static_cast<int>(out.rows);
  p.cols = static_cast<int>(out.cols);
  while (1 << p.log_block < block) ++p.log_block;
  p.q = static_cast<uint8_t*>(out.q);
  p.scale = out.scale;
  p.tensor_amax = tensor_amax;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  p.inverse_cols = 1.0f / static_cast<float>(p.cols);
  p.int8 = out.qtype == QType::kInt8;
  p.qmax = p.int8 ? qmax<QType::kInt8>() : qmax<QType::kE4M3>();
  p.inverse_qmax = 1.0f / p.qmax;
  return rotate_sized(p, out.device, stream);
}

// Rows of a matrix that bulk copies can fetch.
template <typename T>
bool row_aligned(const T* x, int64_t stride) {
  return aligned16(x) && stride * sizeof(T) % 16 == 0;
}

template <typename T>
cudaError_t launch_rotate_quantize(const QuantizeRowsArgs& a, int block, cudaStream_t stream) {
  const T* x = static_cast<const T*>(a.x);
  if (block < 16 || !row_aligned(x, a.row_stride) || !aligned16(a.col_scale)) return cudaErrorNotSupported;
  const RowsOutput out{a.rows, a.cols, a.qtype, a.q, a.scale, a.device};
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (a.tensor_amax == nullptr && aligned16(a.q)) {
      const cudaError_t error = a.col_scale == nullptr
                                    ? relay_rows<false>(x, a.row_stride, nullptr, out, block, stream)
                                    : relay_rows<true>(x, a.row_stride, a.col_scale, out, block, stream);
      if (error != cudaErrorNotSupported) return error;
    }
    if (a.col_scale == nullptr) {
      return rotate_rows(PlainRows<T, false>{x, a.row_stride, nullptr}, out, block, a.tensor_amax, stream);
    }
  }
  return rotate_rows(PlainRows<T, true>{x, a.row_stride, a.col_scale}, out, block, a.tensor_amax, stream);
}

}  // namespace halo_train::detail
