// 8-bit matrices transposed at the speed of memory: rounded on the way, once the scales of the columns are
// known, or as they are. Numerics as in quantize.cu.

#include "quantize.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

// Transposing tiles. A thread reads four neighbouring rows of a group of columns and packs, for each column,
// the four bytes into a word; words go through shared memory and leave as 16 bytes along the rows.
constexpr int kTileRows = 128;
constexpr int kTileWords = kTileRows / 4;  // of one column
constexpr int kGroups = 8;                 // of columns in a tile
constexpr int kTransposeThreads = kTileWords * kGroups;

// Eight groups write the same words of different columns at once; columns are 32 banks apart, so each group
// gets banks of its own by swapping words in fours, which keeps 16-byte reads whole.
__device__ __forceinline__ int tile_slot(int column, int word, int group) {
  return column * kTileWords + (word ^ group << 2);
}

// Writes a tile of kGroups * kColumns columns from shared memory to y [cols, rows].
template <int kColumns, bool kVector>
__device__ __forceinline__ void store_tile(const uint32_t* tile, uint8_t* y, int64_t rows, int64_t cols,
                                           int64_t row0, int64_t col0) {
  constexpr int kChunks = kTileRows / 16;
  for (int i = threadIdx.x; i < kGroups * kColumns * kChunks; i += kTransposeThreads) {
    const int column = i / kChunks, chunk = i % kChunks;
    const int64_t row = row0 + 16 * chunk;
    if (col0 + column >= cols || row >= rows) continue;
    const uint32_t* from = tile + tile_slot(column, 4 * chunk, column / kColumns);
    uint8_t* to = y + (col0 + column) * rows + row;
    if constexpr (kVector) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      const uint8_t* byte = reinterpret_cast<const uint8_t*>(from);
      for (int j = 0; j < 16 && row + j < rows; ++j) to[j] = byte[j];
    }
  }
}

constexpr int kTilesPerBlock =
    8;  // along the rows: the scales of the columns are worked out once for all of them

template <typename T, QType kType, bool kVector>
__global__ void __launch_bounds__(kTransposeThreads) quantize_transposed_kernel(RowsParams<T> p) {
  __shared__ __align__(16) uint32_t tile[kGroups * 8 * kTileWords];
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kGroups * 8, column = col0 + 8 * group;
  float inverse[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (column + j >= p.cols) break;
    const uint32_t amax = __ldg(p.col_amax + column + j);
    inverse[j] = inverse_of<kType>(amax);
    if (blockIdx.y == 0 && word == 0) p.scale[column + j] = scale_of<kType>(amax);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTilesPerBlock * kTileRows;
  Eight<T> x[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) load_columns<T, kVector>(x[r], p, first + 4 * word + r, column);
  for (int t = 0; t < kTilesPerBlock; ++t) {
    const int64_t row0 = first + t * kTileRows, row = row0 + 4 * word;
    if (row0 >= p.rows) break;
    float v[4][8];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float factor = row + r < p.rows ? __ldg(p.row_scale + row + r) : 0.0f;
      x[r].floats(v[r]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[r][j] = v[r][j] * factor * inverse[j];
    }
    if (t + 1 < kTilesPerBlock) {
#pragma unroll
      for (int r = 0; r < 4; ++r) load_columns<T, kVector>(x[r], p, row + kTileRows + r, column);
    }
    if (t > 0) __syncthreads();  // the tile before has been read
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      tile[tile_slot(8 * group + j, word, group)] = round4<kType>(v[0][j], v[1][j], v[2][j], v[3][j]);
    }
    __syncthreads();
    store_tile<8, kVector>(tile, p.q, p.rows, p.cols, row0, col0);
  }
}

template <bool kVector>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_bytes_kernel(const uint8_t* x, uint8_t* y, int64_t rows, int64_t cols) {
  __shared__ __align__(16) uint32_t tile[kGroups * 16 * kTileWords];
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTileRows,
                col0 = static_cast<int64_t>(blockIdx.x) * kGroups * 16;
  const int64_t column = col0 + 16 * group;
  uint32_t in[4][4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = row0 + 4 * word + r;
    if (row >= rows || column >= cols) continue;
    const uint8_t* at = x + row * cols + column;
    if constexpr (kVector) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
      in[r][0] = v.x, in[r][1] = v.y, in[r][2] = v.z, in[r][3] = v.w;
    } else {
      uint8_t* byte = reinterpret_cast<uint8_t*>(in[r]);
      for (int j = 0; j < 16 && column + j < cols; ++j) byte[j] = at[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Four rows of four bytes: pairs of rows interleaved, then pairs of pairs.
    const uint32_t ab_lo = __byte_perm(in[0][i], in[1][i], 0x5140),
                   ab_hi = __byte_perm(in[0][i], in[1][i], 0x7362);
    const uint32_t cd_lo = __byte_perm(in[2][i], in[3][i], 0x5140),
                   cd_hi = __byte_perm(in[2][i], in[3][i], 0x7362);
    const uint32_t out[4] = {__byte_perm(ab_lo, cd_lo, 0x5410), __byte_perm(ab_lo, cd_lo, 0x7632),
                             __byte_perm(ab_hi, cd_hi, 0x5410), __byte_perm(ab_hi, cd_hi, 0x7632)};
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[tile_slot(16 * group + 4 * i + j, word, group)] = out[j];
  }
  __syncthreads();
  store_tile<16, kVector>(tile, y, rows, cols, row0, col0);
}

template <typename T, QType kType, bool kVector>
cudaError_t transposed_sized(const RowsParams<T>& p, bool gather, cudaStream_t stream) {
  if (gather) {
    const cudaError_t error = launch_column_amax<T, kVector>(p, stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, 8 * kGroups)),
                  static_cast<unsigned>(ceil_div(p.rows, kTileRows * kTilesPerBlock)));
  quantize_transposed_kernel<T, kType, kVector><<<grid, kTransposeThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t quantize_rows_transposed(const QuantizeTransposedArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    const RowsParams<T> p{
        static_cast<const T*>(a.x), a.rows, a.cols, a.row_stride, nullptr, a.row_scale, a.col_amax, nullptr,
        static_cast<uint8_t*>(a.q), a.scale};
    return vectorised(p) && a.rows % 16 == 0
               ? transposed_sized<T, kType, true>(p, a.gather_col_amax, stream)
               : transposed_sized<T, kType, false>(p, a.gather_col_amax, stream);
  });
}

cudaError_t transpose_bytes(const void* x, void* y, int64_t rows, int64_t cols, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, 16 * kGroups)),
                  static_cast<unsigned>(ceil_div(rows, kTileRows)));
  const auto* from = static_cast<const uint8_t*>(x);
  auto* to = static_cast<uint8_t*>(y);
  if (aligned(x) && aligned(y) && rows % 16 == 0 && cols % 16 == 0) {
    transpose_bytes_kernel<true><<<grid, kTransposeThreads, 0, stream>>>(from, to, rows, cols);
  } else {
    transpose_bytes_kernel<false><<<grid, kTransposeThreads, 0, stream>>>(from, to, rows, cols);
  }
  return cudaGetLastError();
}

}  // namespace halo_train
