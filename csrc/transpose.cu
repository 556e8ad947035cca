// 8-bit matrices transposed at the speed of memory: rounded on the way, once the scales of the columns are
// known, or as they are. Numerics as in quantize.cu.

#include "quantize.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

// Transposing tiles of kRows rows. A thread reads four neighbouring rows of a group of columns and packs, for
// each column, the four bytes into a word; words go through shared memory and leave as 16 bytes along the
// rows.
constexpr int kGroups = 8;  // of columns in a tile

template <int kRows>
struct Tile {
  static constexpr int kWords = kRows / 4;  // of one column
  static constexpr int kThreads = kWords * kGroups;
  static constexpr int kChunks = kRows / 16;

  // Eight groups write the same words of different columns at once; columns are a multiple of 32 banks apart,
  // so each group gets banks of its own by swapping words in fours, which keeps 16-byte reads whole.
  static __device__ __forceinline__ int slot(int column, int word, int group) {
    return column * kWords + (word ^ group << 2);
  }
};

// Bytes that a side, a row's start and both pointers are a multiple of: 16, 4 or 1.
int common_width(const void* x, const void* y, int64_t rows, int64_t cols) {
  const int64_t bits = reinterpret_cast<intptr_t>(x) | reinterpret_cast<intptr_t>(y) | rows | cols;
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

// At most `count` of 16 bytes from or to addresses that are multiples of kWidth, as is the count.
template <int kWidth>
__device__ __forceinline__ void load_bytes(uint32_t (&word)[4], const uint8_t* p, int64_t count) {
  if constexpr (kWidth == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  } else if constexpr (kWidth == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = 4 * i < count ? __ldg(reinterpret_cast<const uint32_t*>(p) + i) : 0;
  } else {
    uint8_t* byte = reinterpret_cast<uint8_t*>(word);
#pragma unroll
    for (int i = 0; i < 16; ++i) byte[i] = i < count ? __ldg(p + i) : uint8_t{0};
  }
}

template <int kWidth>
__device__ __forceinline__ void store_bytes(uint8_t* p, const uint32_t* from, int64_t count) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  if constexpr (kWidth == 16) {
    *reinterpret_cast<uint4*>(p) = v;
  } else {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWidth == 4) {
        if (4 * i < count) reinterpret_cast<uint32_t*>(p)[i] = word[i];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < count) p[4 * i + j] = static_cast<uint8_t>(word[i] >> (8 * j));
        }
      }
    }
  }
}

// Writes a tile of kGroups * kColumns columns from shared memory to y [cols, rows].
template <int kRows, int kColumns, int kWidth>
__device__ __forceinline__ void store_tile(const uint32_t* tile, uint8_t* y, int64_t rows, int64_t cols,
                                           int64_t row0, int64_t col0) {
  using L = Tile<kRows>;
#pragma unroll
  for (int n = 0; n < kGroups * kColumns * L::kChunks / L::kThreads; ++n) {
    const int i = threadIdx.x + n * L::kThreads, column = i / L::kChunks, chunk = i % L::kChunks;
    const int64_t row = row0 + 16 * chunk;
    if (col0 + column >= cols || row >= rows) continue;
    store_bytes<kWidth>(y + (col0 + column) * rows + row,
                        tile + L::slot(column, 4 * chunk, column / kColumns), rows - row);
  }
}

constexpr int kQuantizedRows = 128;

// kWidth: bytes of a store; those of one byte go with loads of one element. kTiles: along the rows, the next
// one loaded while one is written, for which the scales of the columns are worked out once. kSum: sums of the
// columns of x, in an order that is always the same.
template <typename T, QType kType, int kWidth, bool kSum, int kTiles>
__global__ void __launch_bounds__(Tile<kQuantizedRows>::kThreads)
    quantize_transposed_kernel(RowsParams<T> p, float* partial_sums) {
  using L = Tile<kQuantizedRows>;
  __shared__ __align__(16) uint32_t tile[kGroups * 8 * L::kWords];
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kGroups * 8, column = col0 + 8 * group;
  const int64_t down = block_down(), first = down * kTiles * kQuantizedRows;
  Eight<T> x[4];
  float factor[4];
  const auto load = [&](int64_t row) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      load_columns<T, (kWidth > 1)>(x[r], p, row + r, column);
      factor[r] = p.row_scale != nullptr && row + r < p.rows ? __ldg(p.row_scale + row + r) : 1.0f;
    }
  };
  load(first + 4 * word);
  float inverse[8] = {}, sum[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (column + j >= p.cols) break;
    const uint32_t amax = __ldg(p.col_amax + column + j);
    inverse[j] = inverse_of<kType>(amax);
    if (down == 0 && word == 0) p.scale[column + j] = scale_of<kType>(amax);
  }
#pragma unroll 1
  for (int t = 0; t < kTiles; ++t) {
    const int64_t row0 = first + t * kQuantizedRows;
    if (row0 >= p.rows) break;
    float v[4][8];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      x[r].floats(v[r]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if constexpr (kSum) sum[j] += v[r][j];
        v[r][j] = v[r][j] * factor[r] * inverse[j];
      }
    }
    if (t + 1 < kTiles) load(row0 + kQuantizedRows + 4 * word);
    if (t > 0) __syncthreads();  // the tile before has been read
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      tile[L::slot(8 * group + j, word, group)] = round4<kType>(v[0][j], v[1][j], v[2][j], v[3][j]);
    }
    __syncthreads();
    store_tile<kQuantizedRows, 8, kWidth>(tile, p.q, p.rows, p.cols, row0, col0);
  }
  if constexpr (kSum) {
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(tile);
    static_assert(sizeof(float) * kGroups * 8 * L::kWords <= sizeof(tile), "the sums fit the tile");
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[(8 * group + j) * L::kWords + (word ^ group << 2)] = sum[j];
    __syncthreads();
    constexpr int kParts = L::kThreads / (kGroups * 8), kEach = L::kWords / kParts;  // threads of a column
    const int mine = threadIdx.x / kParts, part = threadIdx.x % kParts;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kEach; ++w) {
      total += sums[mine * L::kWords + part * kEach + (w ^ mine % kEach)];
    }
#pragma unroll
    for (int lanes = 1; lanes < kParts; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    if (part == 0 && col0 + mine < p.cols && first < p.rows)
      partial_sums[down * p.cols + col0 + mine] = total;
  }
}

constexpr int kAddRows = 16;  // threads that share a column

// sums[n] = sum of partial[.., n].
__global__ void __launch_bounds__(32 * kAddRows)
    add_partial_sums_kernel(const float* partial, float* sums, int64_t parts, int64_t cols) {
  __shared__ float shared[kAddRows][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.0f;
  if (column < cols) {
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < parts; i += kAddRows) total += __ldg(partial + i * cols + column);
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= cols) return;
#pragma unroll
  for (int i = 1; i < kAddRows; ++i) total += shared[i][threadIdx.x];
  sums[column] = total;
}

constexpr int kByteRows = 256;

template <int kWidth>
__global__ void __launch_bounds__(Tile<kByteRows>::kThreads)
    transpose_bytes_kernel(const uint8_t* x, uint8_t* y, int64_t rows, int64_t cols) {
  using L = Tile<kByteRows>;
  extern __shared__ uint4 shared[];
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared);
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t row0 = block_down() * kByteRows, col0 = static_cast<int64_t>(blockIdx.x) * kGroups * 16;
  const int64_t column = col0 + 16 * group;
  uint32_t in[4][4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = row0 + 4 * word + r;
    if (row < rows && column < cols) load_bytes<kWidth>(in[r], x + row * cols + column, cols - column);
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
    for (int j = 0; j < 4; ++j) tile[L::slot(16 * group + 4 * i + j, word, group)] = out[j];
  }
  __syncthreads();
  store_tile<kByteRows, 16, kWidth>(tile, y, rows, cols, row0, col0);
}

template <int kWidth>
cudaError_t launch_transpose_bytes(const uint8_t* x, uint8_t* y, int64_t rows, int64_t cols,
                                   cudaStream_t stream) {
  constexpr size_t kShared = sizeof(uint32_t) * kGroups * 16 * Tile<kByteRows>::kWords;
  static_assert(kShared <= 48 * 1024, "more has to be asked for");
  const dim3 grid = tile_grid(ceil_div(cols, 16 * kGroups), ceil_div(rows, kByteRows));
  transpose_bytes_kernel<kWidth><<<grid, Tile<kByteRows>::kThreads, kShared, stream>>>(x, y, rows, cols);
  return cudaGetLastError();
}

// Two tiles are the fastest; with sums, which have a cost for each thread block, four.
constexpr int kTiles = 2, kSumTiles = 4;

template <typename T, QType kType, int kWidth>
cudaError_t transposed_sized(const RowsParams<T>& p, const QuantizeTransposedArgs& a, cudaStream_t stream) {
  if (a.gather_col_amax) {
    const cudaError_t error = launch_column_amax<T, (kWidth > 1)>(p, stream);
    if (error != cudaSuccess) return error;
  }
  const auto grid = [&](int tiles) {
    return tile_grid(ceil_div(p.cols, 8 * kGroups), ceil_div(p.rows, kQuantizedRows * tiles));
  };
  constexpr int kThreads = Tile<kQuantizedRows>::kThreads;
  if (a.sums == nullptr) {
    quantize_transposed_kernel<T, kType, kWidth, false, kTiles>
        <<<grid(kTiles), kThreads, 0, stream>>>(p, nullptr);
    return cudaGetLastError();
  }
  quantize_transposed_kernel<T, kType, kWidth, true, kSumTiles>
      <<<grid(kSumTiles), kThreads, 0, stream>>>(p, a.partial_sums);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  add_partial_sums_kernel<<<static_cast<unsigned>(ceil_div(p.cols, 32)), dim3(32, kAddRows), 0, stream>>>(
      a.partial_sums, a.sums, ceil_div(p.rows, kQuantizedRows * kSumTiles), p.cols);
  return cudaGetLastError();
}

}  // namespace

cudaError_t quantize_rows_transposed(const QuantizeTransposedArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    RowsParams<T> p{};
    p.x = static_cast<const T*>(a.x);
    p.rows = a.rows;
    p.cols = a.cols;
    p.row_stride = a.row_stride;
    p.row_scale = a.row_scale;
    p.col_amax = a.col_amax;
    p.q = static_cast<uint8_t*>(a.q);
    p.scale = a.scale;
    if (!vectorised(p) || a.rows % 4 != 0) return transposed_sized<T, kType, 1>(p, a, stream);
    return a.rows % 16 == 0 ? transposed_sized<T, kType, 16>(p, a, stream)
                            : transposed_sized<T, kType, 4>(p, a, stream);
  });
}

int64_t column_sums_scratch(int64_t rows, int64_t cols) {
  return ceil_div(rows, kQuantizedRows * kSumTiles) * cols;
}

cudaError_t transpose_bytes(const void* x, void* y, int64_t rows, int64_t cols, cudaStream_t stream) {
  const auto* from = static_cast<const uint8_t*>(x);
  auto* to = static_cast<uint8_t*>(y);
  switch (common_width(x, y, rows, cols)) {
    case 16:
      return launch_transpose_bytes<16>(from, to, rows, cols, stream);
    case 4:
      return launch_transpose_bytes<4>(from, to, rows, cols, stream);
    default:
      return launch_transpose_bytes<1>(from, to, rows, cols, stream);
  }
}

}  // namespace halo_train
