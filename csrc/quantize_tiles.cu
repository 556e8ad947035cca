// The columns of a weight or an input in e4m3 with a scale for each tile of kScaleBlock x kScaleBlock, in one
// read: the cluster of thread blocks of grad_blocks_kernel.cuh holds such a tile, and what its scale depends
// on is one number from each. Numerics as there.

#include "grad_blocks_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

// Of rows that are divided by their scale, whose RMS is near 448 / 4 then, scales are this times a power of
// 16: as a rule one for all, up to 32 RMS, and no deviation of codes of 2 to 8, which cost clock in products.
constexpr float kDivided = 8.0f;

template <typename Source, bool kColumnFactors>
__global__ void __launch_bounds__(32 * kBlockWarps, 4) quantize_tiles_kernel(const GradParams<Source> p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kThreads = 32 * kBlockWarps, kPeers = kAcross * kDown;
  constexpr bool kVector = Source::kVector;
  __shared__ __align__(16) CodeTile tile;
  __shared__ __align__(16) float row_factors[kBlockRows], column_factors[kBlockColumns];
  __shared__ uint32_t warp_maxima[kBlockWarps], maxima[kPeers];
  __shared__ uint64_t received;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = (lane & 7) | (lane >> 1 & 8), half = lane >> 3 & 1;  // of 8 columns, of the warp's rows
  const int tile_row = 16 * warp + 8 * half;
  // From the last rows to the first: the L2 cache still has the last ones of an input whose rows were
  // rounded.
  const int64_t clusters = ceil_div(p.rows, kScaleBlock), from_end = block_down() / kDown;
  const int64_t cluster = from_end < clusters ? clusters - 1 - from_end : from_end;  // the grid may be taller
  const int64_t down = cluster * kDown + block_down() % kDown;
  const int64_t row0 = down * kBlockRows, col0 = static_cast<int64_t>(blockIdx.x) * kBlockColumns;
  const uint32_t rank = blockIdx.y % kDown * kAcross + blockIdx.x % kAcross;
  expect_in_cluster(&received, sizeof(maxima));
  uint32_t pairs[1][8][4];
  float no_sums[8];
  BlockValues<Source, false>(nullptr, p, row0 + tile_row, col0 + 8 * group).make(pairs, no_sums);
  static_assert(kBlockRows + kBlockColumns <= kThreads);
  if (kColumnFactors && threadIdx.x >= kThreads - kBlockColumns) {
    const int i = threadIdx.x - (kThreads - kBlockColumns);
    column_factors[i] = col0 + i < p.cols ? __ldg(p.col_scale[0] + col0 + i) : 1.0f;
  }
  if (threadIdx.x < kBlockRows) {
    const int64_t row = row0 + threadIdx.x;
    float factor = 1.0f;
    if (row < p.rows) {
      if (p.row_divisor != nullptr) factor = __frcp_rn(__ldg(p.row_divisor + row)) / kDivided;
      if (p.row_scale != nullptr) factor *= __ldg(p.row_scale + row);
    }
    row_factors[threadIdx.x] = factor;
  }
  __syncthreads();
  float s[8];
  read8(s, reinterpret_cast<const float4*>(row_factors + tile_row));
  float t[8];
  uint32_t across[4];
  if constexpr (kColumnFactors) {
    read8(t, reinterpret_cast<const float4*>(column_factors + 8 * group));
#pragma unroll
    for (int i = 0; i < 4; ++i) across[i] = pair_of(t[2 * i], t[2 * i + 1]);
  }
  uint32_t best = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const uint32_t factor = pair_of(s[r], s[r]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t y = multiply_pair(pairs[0][r][i], factor);
      if constexpr (kColumnFactors) y = multiply_pair(y, across[i]);
      // Not the larger of y and zero: ptxas 13.0 makes that a product that is zero where y is negative.
      best = r == 0 && i == 0 ? y : max_magnitudes(best, y);
    }
  }
  best = max_magnitudes(best, __byte_perm(best, 0, 0x1032)) & 0x7fffu;
  best = __reduce_max_sync(0xffffffffu, best);  // NaN is above all
  if (lane == 0) warp_maxima[warp] = best;
  wait_for_cluster();
  __syncthreads();
  if (threadIdx.x < kPeers) {
    best = warp_maxima[0];
#pragma unroll
    for (int w = 1; w < kBlockWarps; ++w) best = max(best, warp_maxima[w]);
    send_in_cluster(&maxima[rank], best, &received, threadIdx.x);
  }
  wait_for_all(&received);
  best = maxima[0];
#pragma unroll
  for (int i = 1; i < kPeers; ++i) best = max(best, maxima[i]);
  if (rank == 0 && threadIdx.x == 0 && row0 < p.rows) {
    p.forms[0].col_scales[down / kDown * (gridDim.x / kAcross) + blockIdx.x / kAcross] =
        p.row_divisor != nullptr ? kDivided * power_scale(best) : power_scale(best);
  }
  const uint32_t inverse = inverse_scales(best << 16 | best);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float low[8], high[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      scale_pair(low[r], high[r], pairs[0][r][i], inverse);
      low[r] *= s[r], high[r] *= s[r];
      if constexpr (kColumnFactors) low[r] *= t[2 * i], high[r] *= t[2 * i + 1];
    }
    const auto put = [&](int c, const float (&v)[8]) {
      *reinterpret_cast<uint2*>(tile.rows16(8 * group + c, warp) + 8 * half) = make_uint2(
          round4<QType::kE4M3>(v[0], v[1], v[2], v[3]), round4<QType::kE4M3>(v[4], v[5], v[6], v[7]));
    };
    put(2 * i, low);
    put(2 * i + 1, high);
  }
  __syncthreads();
  const int c0 = threadIdx.x / kBlockWarps, sixteen = threadIdx.x % kBlockWarps;
  const int64_t row = row0 + 16 * sixteen;
  if (row >= p.rows) return;
  uint8_t* to = p.forms[0].columns + (col0 + c0) * p.rows + row;
#pragma unroll
  for (int c = c0; c < c0 + kBlockColumns;
       c += kThreads / kBlockWarps, to += kThreads / kBlockWarps * p.rows) {
    if (col0 + c >= p.cols) break;
    store_bytes<kVector ? 16 : 1>(to, reinterpret_cast<const uint32_t*>(tile.rows16(c, sixteen)),
                                  p.rows - row);
  }
#endif
}

template <typename M>
cudaError_t launch(const QuantizeGradArgs& a, const M& matrix, cudaStream_t stream) {
  GradParams<PlainGrad<M>> p{};
  p.source.x = matrix;
  p.rows = a.rows;
  p.cols = a.cols;
  p.row_scale = a.row_scale;
  p.row_divisor = a.row_divisor;
  p.col_scale[0] = a.col_scale;
  p.forms[0] = a.forms;
  return launch_in_clusters(a.col_scale != nullptr ? quantize_tiles_kernel<PlainGrad<M>, true>
                                                   : quantize_tiles_kernel<PlainGrad<M>, false>,
                            p, 0, stream);
}

template <typename T>
cudaError_t launch_any(const QuantizeGradArgs& a, cudaStream_t stream) {
  const Matrix<T> x{static_cast<const T*>(a.x), a.row_stride};
  return grad_vectors(x, a.rows, a.cols) ? launch(a, x, stream)
                                         : launch(a, AnyMatrix{a.x, a.dtype, a.row_stride}, stream);
}

}  // namespace

cudaError_t quantize_tiles(const QuantizeGradArgs& a, cudaStream_t stream) {
  if (a.qtype != QType::kE4M3) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return launch_any<__half>(a, stream);
    case DType::kFloat32:
      return launch_any<float>(a, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
