// Gradients in both 8-bit forms as in quantize_grad_kernel.cuh, in one read of their inputs: a row has a
// scale for each block of kScaleBlock columns, a column one for each block of as many rows, so that the
// thread blocks of a cluster hold all that a scale depends on. Scales are powers of 16; numerics as in
// halo_train/ops/block_reference.py: values pass through bfloat16, in pairs of which everything here is done.

#pragma once

#include "cluster.cuh"
#include "quantize_grad_kernel.cuh"

namespace halo_train::detail {

// A thread block holds a tile of 16 kBlockWarps rows of 128 columns: a warp 16 rows, a thread 8 rows of 8
// columns. A cluster holds kScaleBlock rows of kScaleBlock columns.
constexpr int kBlockWarps = 8, kBlockRows = 16 * kBlockWarps, kBlockColumns = 128;
constexpr int kAcross = kScaleBlock / kBlockColumns, kDown = kScaleBlock / kBlockRows;  // thread blocks
static_assert(kAcross <= 4, "four lanes hold the same maxima of rows and send them to a thread block each");

constexpr uint32_t kMagnitudes = 0x7fff7fffu;

// The larger of the magnitudes of pairs, NaN if one is; its sign is no one's.
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) {
  uint32_t largest = 0;
#if __CUDA_ARCH__ >= 900
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
#endif
  return largest;
}
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t product = 0;
#if __CUDA_ARCH__ >= 900
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
#endif
  return product;
}
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The exponents of scales, biased as those of floats, are those of the largest magnitudes, or one more, less
// this, and up to the next multiple of 4 (with the bias, to where both lowest bits are set). The smallest is
// 2^-60: sums of a product must not overflow on the way from one scale to the next.
constexpr uint32_t kScaleShift = 8, kSmallestScale = 67, kAboveLargest = 0x1f;  // 448 = 1.75 2^8
constexpr uint32_t kMultipleOf4 = 3;

// 2^-k of pairs of magnitudes, k the smallest multiple of 4 with magnitude <= 448 2^k.
__device__ __forceinline__ uint32_t inverse_scales(uint32_t amax) {
  constexpr uint32_t kLeast = kSmallestScale + kScaleShift, kTwice = 254 + kScaleShift;
  const uint32_t larger = (amax + (kAboveLargest << 16 | kAboveLargest)) & 0x7f807f80u;
  const uint32_t exponents = larger | kMultipleOf4 << 23 | kMultipleOf4 << 7;
  return (kTwice << 23 | kTwice << 7) - __vmaxu2(exponents, kLeast << 23 | kLeast << 7);
}
// The scale of one magnitude: that 2^k, 1 if there is nothing but zeros, NaN for what is not finite.
__device__ __forceinline__ float power_scale(uint32_t amax) {
  const uint32_t larger = (amax + kAboveLargest) >> 7 | kMultipleOf4;
  const uint32_t exponent = max(larger, kSmallestScale + kScaleShift) - kScaleShift;
  return __uint_as_float(amax == 0 ? 0x3f800000u : amax >= 0x7f80u ? 0x7fc00000u : exponent << 23);
}

// Maxima of the rows of a tile in parts of kBlockColumns columns, of its columns in parts of kBlockRows rows,
// two a word.
struct BlockMaxima {
  uint32_t rows[kAcross][kBlockRows / 2];
  uint32_t columns[kDown][kBlockColumns / 2];
};

// Eight maxima of eight from all parts; `first` of the parts, kStride words apart.
template <int kParts, int kStride>
__device__ __forceinline__ void combine_maxima(uint32_t (&best)[4], const uint32_t* first) {
#pragma unroll
  for (int k = 0; k < kParts; ++k) {
    const uint4 part = *reinterpret_cast<const uint4*>(first + k * kStride);
    const uint32_t words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = k == 0 ? words[i] : max_magnitudes(best[i], words[i]) & kMagnitudes;
  }
}
template <int kParts, int kStride>
__device__ __forceinline__ float scale_from(const uint32_t* maxima, int i) {
  uint32_t best = 0;
#pragma unroll
  for (int k = 0; k < kParts; ++k) {
    best = max(best, static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(maxima + k * kStride)[i]));
  }
  return power_scale(best);
}

// The codes of a tile on their way to [cols, rows]: sixteen rows of a column are together, in an order that
// differs between groups of eight columns so that what a warp writes at once is in different banks.
struct CodeTile {
  uint8_t code[kBlockColumns][kBlockRows];

  __device__ __forceinline__ uint8_t* rows16(int column, int warp) {
    return code[column] + 16 * (warp ^ (column / 8 & 7));
  }
};

// What a thread reads and makes of it: pairs of bfloat16 of 8 rows of 8 columns, zeros outside. Of a matrix
// all loads go to registers at once; the inputs of an activation wait in shared memory, where nobody else
// looks, because registers are for what is made of them.
template <typename Source, bool kSum>
class BlockValues {
  static constexpr int kInputs = Source::kInputs, kOutputs = Source::kOutputs, kThreads = 32 * kBlockWarps;
  static constexpr bool kVector = Source::kVector;
  static constexpr bool kAsTheyAre = std::is_same_v<Source, PlainGrad<Matrix<__nv_bfloat16>>>;
  static constexpr int kBatch = kAsTheyAre ? 8 : 2;  // rows

 public:
  static constexpr bool kPairsAreInputs = kAsTheyAre;
  static constexpr bool kStaged = kVector && kInputs > 1;
  static constexpr size_t kBytes = kStaged ? sizeof(uint4) * 8 * kInputs * kThreads : 0;

  __device__ __forceinline__ BlockValues(uint4* memory, const GradParams<Source>& p, int64_t row,
                                         int64_t column)
      : memory_(memory + threadIdx.x), p_(p), row_(row), column_(column) {
    if constexpr (kStaged) {
      static_assert(sizeof(typename Source::Raw) == kInputs * sizeof(uint4), "16-bit inputs");
      if (!inside()) return;
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
          const auto& m = p.source.input(i);
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot(r, i))),
                       "l"(m.x + row * m.stride + column + r * m.stride)
                       : "memory");
        }
        if (r % kBatch == kBatch - 1) asm volatile("cp.async.commit_group;" ::: "memory");
      }
    }
  }
  // With the sums of the columns of the first output where they are wanted and pairs do not tell them.
  __device__ __forceinline__ void make(uint32_t (&pairs)[kOutputs][8][4], float (&sum)[8]) const {
    if (!inside()) {
#pragma unroll
      for (int i = 0; i < kOutputs * 32; ++i) pairs[i / 32][i / 4 % 8][i % 4] = 0;
      return;
    }
    if constexpr (kVector) {
      make_rows<0>(pairs, sum);
    } else {
#pragma unroll 1
      for (int r = 0; r < 8; ++r) {
        typename Source::Raw raw;
        p_.source.load(raw, row_ + r, column_, p_.rows, p_.cols);
        make_row(pairs, sum, r, raw);
      }
    }
  }

 private:
  // Of vectors all are, or none.
  __device__ __forceinline__ bool inside() const { return row_ < p_.rows && column_ < p_.cols; }
  __device__ __forceinline__ uint4* slot(int row, int input) const {
    return memory_ + (row * kInputs + input) * kThreads;
  }
  template <int kRow>
  __device__ __forceinline__ void make_rows(uint32_t (&pairs)[kOutputs][8][4], float (&sum)[8]) const {
    if constexpr (kRow < 8) {
      if constexpr (kStaged)
        asm volatile("cp.async.wait_group %0;" ::"n"((8 - kRow) / kBatch - 1) : "memory");
      typename Source::Raw raw[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
          auto& eight = Source::eight(raw[b], i);
          if constexpr (kStaged) {
            const uint4 w = *slot(kRow + b, i);
            eight.word[0] = w.x, eight.word[1] = w.y, eight.word[2] = w.z, eight.word[3] = w.w;
          } else {
            const auto& m = p_.source.input(i);
            eight.load(m.x + row_ * m.stride + column_ + (kRow + b) * m.stride);
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) make_row(pairs, sum, kRow + b, raw[b]);
      make_rows<kRow + kBatch>(pairs, sum);
    }
  }
  __device__ __forceinline__ void make_row(uint32_t (&pairs)[kOutputs][8][4], float (&sum)[8], int r,
                                           const typename Source::Raw& raw) const {
    float v[kOutputs][8];
    if constexpr (!kAsTheyAre) p_.source.values(v, raw);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kAsTheyAre) {
          pairs[o][r][i] = raw.x.word[i];
        } else {
          pairs[o][r][i] = pair_of(v[o][2 * i], v[o][2 * i + 1]);
        }
      }
    }
    if constexpr (kSum && !kAsTheyAre) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += v[0][j];
    }
  }

  uint4* const memory_;
  const GradParams<Source>& p_;
  const int64_t row_, column_;
};

// The largest magnitudes of a warp's 16 rows, of which lanes 2 i and 2 i + 1, and those 16 above, get two,
// and of its columns, of which lanes i and i + 8 get eight. `s` and `t`: pairs of the factors of rows, twice
// the same, and of columns.
__device__ __forceinline__ void find_maxima(uint32_t& row_best, uint32_t (&col_best)[4],
                                            const uint32_t (&pairs)[8][4], const float (&s)[8],
                                            const float (&t)[8], int lane) {
  uint32_t rows[4], across[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) across[i] = pair_of(t[2 * i], t[2 * i + 1]);
#pragma unroll
  for (int r = 0; r < 8; r += 2) {
    uint32_t best[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t (&x)[4] = pairs[r + h];
      const uint32_t down = pair_of(s[r + h], s[r + h]);
      best[h] =
          max_magnitudes(max_magnitudes(multiply_pair(x[0], across[0]), multiply_pair(x[1], across[1])),
                         max_magnitudes(multiply_pair(x[2], across[2]), multiply_pair(x[3], across[3])));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t y = multiply_pair(x[i], down);
        col_best[i] = r + h == 0 ? y : max_magnitudes(col_best[i], y);
      }
    }
    rows[r / 2] =
        max_magnitudes(__byte_perm(best[0], best[1], 0x5410), __byte_perm(best[0], best[1], 0x7632));
  }
  // Lanes that differ in bits 0, 1, 2 and 4 hold the same rows: two bits halve what a lane goes on with.
  const bool upper = lane & 4, odd = lane & 2;
  uint32_t keep[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? rows[i] : rows[i + 2], 4);
    keep[i] = max_magnitudes(upper ? rows[i + 2] : rows[i], other);
  }
  row_best =
      max_magnitudes(odd ? keep[1] : keep[0], __shfl_xor_sync(0xffffffffu, odd ? keep[0] : keep[1], 2));
  row_best = max_magnitudes(row_best, __shfl_xor_sync(0xffffffffu, row_best, 1));
  row_best = max_magnitudes(row_best, __shfl_xor_sync(0xffffffffu, row_best, 16)) & kMagnitudes;
#pragma unroll
  for (uint32_t& best : col_best) {
    best = max_magnitudes(best, __shfl_xor_sync(0xffffffffu, best, 8)) & kMagnitudes;
  }
}

// A word of pairs times 2^-k of both: exact.
__device__ __forceinline__ void scale_pair(float& low, float& high, uint32_t pair, uint32_t inverse) {
  const uint32_t y = multiply_pair(pair, inverse);
  low = low_of(y);
  high = high_of(y);
}

// Codes lie where inputs have waited.
template <typename Source>
constexpr size_t kBlockBytes =
    std::max(BlockValues<Source, false>::kBytes, Source::kOutputs * sizeof(CodeTile));

template <typename Source>
constexpr int kResidentBlocks = Source::kOutputs == 1 ? 4 : 2;  // of a multiprocessor

template <typename Source, bool kSum>
__global__ void __launch_bounds__(32 * kBlockWarps, kResidentBlocks<Source>)
    grad_blocks_kernel(const GradParams<Source> p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kOutputs = Source::kOutputs, kThreads = 32 * kBlockWarps;
  constexpr bool kVector = Source::kVector;
  extern __shared__ uint4 block_memory[];
  CodeTile* const tile = reinterpret_cast<CodeTile*>(block_memory);
  __shared__ __align__(16) BlockMaxima maxima[kOutputs];
  __shared__ __align__(16) uint32_t warp_maxima[kOutputs][kBlockWarps][kBlockColumns / 2];
  __shared__ __align__(16) float row_factors[kBlockRows], col_factors[kOutputs][kBlockColumns];
  __shared__ uint64_t received;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = (lane & 7) | (lane >> 1 & 8), half = lane >> 3 & 1;  // of 8 columns, of the warp's rows
  const int tile_row = 16 * warp + 8 * half;
  const int64_t down = block_down();
  const int64_t row0 = down * kBlockRows, col0 = static_cast<int64_t>(blockIdx.x) * kBlockColumns;
  const int64_t row = row0 + tile_row, column = col0 + 8 * group;
  const bool inside = row < p.rows && column < p.cols;                       // of vectors all or none
  const uint32_t across = blockIdx.x % kAcross, below = blockIdx.y % kDown;  // in the cluster
  expect_in_cluster(&received, sizeof(maxima));
  uint32_t pairs[kOutputs][8][4];
  using Values = BlockValues<Source, kSum>;
  static_assert(kBlockRows <= kThreads && kBlockColumns <= kThreads);
  // Of what threads do for one row or column of the tile.
  const int tile_r = threadIdx.x, tile_c = kThreads - 1 - threadIdx.x;
  float row_factor = 1.0f, col_factor[kOutputs];  // before the inputs, so that nobody waits for them after
  if (tile_r < kBlockRows && row0 + tile_r < p.rows && p.row_scale != nullptr) {
    row_factor = __ldg(p.row_scale + row0 + tile_r);
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const bool scaled = tile_c < kBlockColumns && col0 + tile_c < p.cols && p.col_scale[o] != nullptr;
    col_factor[o] = scaled ? __ldg(p.col_scale[o] + col0 + tile_c) : 1.0f;
  }
  const Values values(block_memory, p, row, column);
  float sum[8] = {};
  if constexpr (!Values::kStaged) values.make(pairs, sum);
  if (tile_r < kBlockRows) row_factors[tile_r] = row_factor;
  if (tile_c < kBlockColumns) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) col_factors[o][tile_c] = col_factor[o];
  }
  if constexpr (Values::kStaged) values.make(pairs, sum);
  __syncthreads();
  const int sent = tile_row / 2 + 2 * (lane >> 2 & 1) + (lane >> 1 & 1), to = (lane & 1) | (lane >> 3 & 2);
  uint32_t row_best[kOutputs];
  {
    float s[8], t[8];
    read8(s, reinterpret_cast<const float4*>(row_factors + tile_row));
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      uint32_t col_best[4];
      read8(t, reinterpret_cast<const float4*>(col_factors[o] + 8 * group));
      find_maxima(row_best[o], col_best, pairs[o], s, t, lane);
      if (half == 0) {
        *reinterpret_cast<uint4*>(&warp_maxima[o][warp][4 * group]) =
            make_uint4(col_best[0], col_best[1], col_best[2], col_best[3]);
      }
    }
  }
  wait_for_cluster();
  if (to < kAcross) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      send_in_cluster(&maxima[o].rows[across][sent], row_best[o], &received, below * kAcross + to);
    }
  }
  __syncthreads();
  static_assert(kDown * kBlockColumns / 2 <= kThreads);
  if (threadIdx.x < kDown * kBlockColumns / 2) {
    const int pair = threadIdx.x % (kBlockColumns / 2);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      uint32_t best = warp_maxima[o][0][pair];
#pragma unroll
      for (int w = 1; w < kBlockWarps; ++w) best = max_magnitudes(best, warp_maxima[o][w][pair]);
      send_in_cluster(&maxima[o].columns[below][pair], best & kMagnitudes, &received,
                      threadIdx.x / (kBlockColumns / 2) * kAcross + across);
    }
  }
  __shared__ float warp_sums[kSum ? kBlockWarps : 1][kSum ? kBlockColumns : 1];
  if constexpr (kSum) {  // while maxima are on their way
    if constexpr (Values::kPairsAreInputs) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        sum[i % 4 * 2] += low_of(pairs[0][i / 4][i % 4]);
        sum[i % 4 * 2 + 1] += high_of(pairs[0][i / 4][i % 4]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 8);
      if (half == 0) warp_sums[warp][8 * group + j] = sum[j];
    }
  }
  wait_for_all(&received);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const GradForms& forms = p.forms[o];
    if (across == 0 && tile_r < kBlockRows && row0 + tile_r < p.rows) {
      forms.row_scales[blockIdx.x / kAcross * p.rows + row0 + tile_r] =
          scale_from<kAcross, kBlockRows / 2>(maxima[o].rows[0], tile_r);
    }
    // Of many rows the grid is taller than they are (block_down()).
    if (below == 0 && row0 < p.rows && tile_c < kBlockColumns && col0 + tile_c < p.cols) {
      forms.col_scales[down / kDown * p.cols + col0 + tile_c] =
          scale_from<kDown, kBlockColumns / 2>(maxima[o].columns[0], tile_c);
    }
    {
      uint32_t inverse[4];
      combine_maxima<kDown, kBlockColumns / 2>(inverse, &maxima[o].columns[0][4 * group]);
      float s[8];
      read8(s, reinterpret_cast<const float4*>(row_factors + tile_row));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        inverse[i] = inverse_scales(inverse[i]);
        float low[8], high[8];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          scale_pair(low[r], high[r], pairs[o][r][i], inverse[i]);
          low[r] *= s[r], high[r] *= s[r];
        }
        const auto put = [&](int c, const float (&v)[8]) {
          *reinterpret_cast<uint2*>(tile[o].rows16(8 * group + c, warp) + 8 * half) = make_uint2(
              round4<QType::kE4M3>(v[0], v[1], v[2], v[3]), round4<QType::kE4M3>(v[4], v[5], v[6], v[7]));
        };
        put(2 * i, low);
        put(2 * i + 1, high);
      }
    }
    {
      uint32_t inverse[4];
      combine_maxima<kAcross, kBlockRows / 2>(inverse, &maxima[o].rows[0][tile_row / 2]);
      float t[8];
      read8(t, reinterpret_cast<const float4*>(col_factors[o] + 8 * group));
      uint8_t* to = forms.rows + row * p.cols + column;
#pragma unroll
      for (int r = 0; r < 8; ++r, to += p.cols) {
        if (r % 2 == 0) inverse[r / 2] = inverse_scales(inverse[r / 2]);
        const uint32_t both = __byte_perm(inverse[r / 2], 0, r % 2 == 0 ? 0x1010 : 0x3232);
        float v[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scale_pair(v[2 * i], v[2 * i + 1], pairs[o][r][i], both);
          v[2 * i] *= t[2 * i], v[2 * i + 1] *= t[2 * i + 1];
        }
        if (kVector ? inside : row + r < p.rows && column < p.cols) {
          store8<kVector>(to,
                          make_uint2(round4<QType::kE4M3>(v[0], v[1], v[2], v[3]),
                                     round4<QType::kE4M3>(v[4], v[5], v[6], v[7])),
                          p.cols - column);
        }
      }
    }
  }
  __syncthreads();
  if constexpr (kSum) {
    if (tile_c < kBlockColumns && col0 + tile_c < p.cols && row0 < p.rows) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) total += warp_sums[w][tile_c];
      p.partial_sums[down * p.cols + col0 + tile_c] = total;
    }
  }
  const int c0 = threadIdx.x / kBlockWarps, sixteen = threadIdx.x % kBlockWarps;
  const int64_t r = row0 + 16 * sixteen;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    if (r >= p.rows) continue;
    uint8_t* to = p.forms[o].columns + (col0 + c0) * p.rows + r;
#pragma unroll
    for (int c = c0; c < c0 + kBlockColumns; c += 32, to += 32 * p.rows) {
      if (col0 + c >= p.cols) break;
      store_bytes<kVector ? 16 : 1>(to, reinterpret_cast<const uint32_t*>(tile[o].rows16(c, sixteen)),
                                    p.rows - r);
    }
  }
#endif
}

// A thread block for each tile, in clusters that hold kScaleBlock rows of kScaleBlock columns.
// cudaErrorNotSupported before Hopper, which has none.
template <typename P>
cudaError_t launch_in_clusters(void (*kernel)(P), const P& p, size_t shared, cudaStream_t stream) {
  if (!launches_early()) return cudaErrorNotSupported;
  const int64_t down = ceil_div(p.rows, kScaleBlock), most = 65535 / kDown;  // clusters
  const auto y = static_cast<unsigned>(std::min(down, most)), z = static_cast<unsigned>(ceil_div(down, most));
  if (shared > 32 * 1024) {  // with what the kernel declares itself more than needs no asking
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kAcross, kDown, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(p.cols, kScaleBlock)) * kAcross, y * kDown, z);
  config.blockDim = dim3(32 * kBlockWarps);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <typename Source, bool kSum>
cudaError_t launch_grad_blocks(const GradParams<Source>& p, cudaStream_t stream) {
  return launch_in_clusters(grad_blocks_kernel<Source, kSum>, p, kBlockBytes<Source>, stream);
}

}  // namespace halo_train::detail
