// Sums over rows and columns of matrices that are read once: of one matrix, at the speed of memory, and of a
// stack of small ones together with what rounding left of them.
//
// Thread blocks of 8 warps walk down stripes of 2048 columns, 64 rows at a time. A thread keeps the sums of
// its eight columns in registers; those of four rows are reduced together in each warp and meet in shared
// memory. A second kernel adds up what the stripes found. Sums are in double: squares of whatever a bfloat16
// or float holds stay in range.

#include "moments.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

using namespace detail;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStripe = 8 * kThreads;  // columns
constexpr int kRows = 64;
constexpr int kTogether = 4;  // rows
constexpr int kBlocksPerProcessor = 3;
constexpr unsigned kAll = 0xffffffff;

struct Grid {
  int64_t stripes, blocks;  // thread blocks along the rows
  Grid(int64_t rows, int64_t cols, int device) : stripes(ceil_div(cols, kStripe)) {
    const int64_t enough = ceil_div(kBlocksPerProcessor * multiprocessors(device), stripes);
    blocks = std::min(ceil_div(rows, kRows), enough);
  }
};

template <typename T>
struct MomentsParams {
  const T* x;
  int64_t rows, cols, row_stride;
  double* of_rows;     // [stripes, 3, rows]
  double* of_columns;  // [blocks, 2, cols]
};

// The sums over a warp of four values a lane; lane 8 i has that of value i. Each of the first two steps
// halves the values that a lane still has a part in: 12 shuffles of a register instead of 40.
__device__ double sum_of_four(double (&v)[kTogether], int lane) {
  const bool upper = lane & 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const double kept = upper ? v[i + 2] : v[i];
    v[i] = kept + __shfl_xor_sync(kAll, upper ? v[i] : v[i + 2], 16);
  }
  const bool odd = lane & 8;
  double sum = (odd ? v[1] : v[0]) + __shfl_xor_sync(kAll, odd ? v[0] : v[1], 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) moments_kernel(MomentsParams<T> p) {
  __shared__ double sums[kRows][kWarps], squares[kRows][kWarps];
  __shared__ uint32_t largest[kRows][kWarps];  // the bits of a float without sign: NaN is above all
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kStripe + 8 * threadIdx.x;
  double col_sum[8] = {}, col_square[8] = {};
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows; row0 < p.rows; row0 += step) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kRows), p.rows - row0));
    for (int r = 0; r < count; r += kTogether) {
      Eight<T> x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const T* row = p.x + (row0 + r + i) * p.row_stride + column;
        if (column >= p.cols || r + i >= count) {
          x[i].clear();
        } else if constexpr (kVector) {
          x[i].load(row);
        } else {
          x[i].load_part(row, p.cols - column);
        }
      }
      uint32_t amax[kTogether];
      double sum[kTogether], square[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float v[8];
        x[i].floats(v);
        amax[i] = 0, sum[i] = 0.0, square[i] = 0.0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const double d = v[j];
          amax[i] = max(amax[i], magnitude(v[j]));
          sum[i] += d;
          square[i] = fma(d, d, square[i]);
          col_sum[j] += d;
          col_square[j] = fma(d, d, col_square[j]);
        }
        amax[i] = __reduce_max_sync(kAll, amax[i]);
      }
      const double of_row = sum_of_four(sum, lane), of_squares = sum_of_four(square, lane);
      if (lane % 8 == 0) {
        const int i = lane / 8;
        sums[r + i][warp] = of_row, squares[r + i][warp] = of_squares;
        largest[r + i][warp] = i == 0 ? amax[0] : i == 1 ? amax[1] : i == 2 ? amax[2] : amax[3];
      }
    }
    __syncthreads();
    if (threadIdx.x < count) {
      const int r = threadIdx.x;
      uint32_t amax = 0;
      double sum = 0.0, square = 0.0;
      for (int w = 0; w < kWarps; ++w) {
        amax = max(amax, largest[r][w]);
        sum += sums[r][w];
        square += squares[r][w];
      }
      double* out = p.of_rows + blockIdx.x * 3 * p.rows + row0 + r;
      out[0] = __uint_as_float(amax);
      out[p.rows] = sum;
      out[2 * p.rows] = square;
    }
    __syncthreads();
  }
  double* out = p.of_columns + blockIdx.y * 2 * p.cols + column;
  for (int j = 0; j < 8 && column + j < p.cols; ++j) {
    out[j] = col_sum[j];
    out[p.cols + j] = col_square[j];
  }
}

// Eight rounded values as loaded, of any of the types: what they hold before they are scaled.
template <QType kType, bool kVector>
__device__ __forceinline__ void load_rounded(float (&v)[8], const uint8_t* p, int64_t count) {
  uint32_t word[2];
  if constexpr (kVector) {
    const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(p));
    word[0] = loaded.x, word[1] = loaded.y;
  } else {
    uint8_t* byte = reinterpret_cast<uint8_t*>(word);
#pragma unroll
    for (int j = 0; j < 8; ++j) byte[j] = j < count ? p[j] : 0;
  }
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const uint32_t pair = word[j / 4] >> (8 * (j % 4));
    if constexpr (kType == QType::kInt8) {
      v[j] = static_cast<int8_t>(pair), v[j + 1] = static_cast<int8_t>(pair >> 8);
    } else {
      constexpr auto kInterpretation = kType == QType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
      const __half2_raw raw =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), kInterpretation);
      const float2 values = __half22float2(__half2(raw));
      v[j] = values.x, v[j + 1] = values.y;
    }
  }
}

// Which of kExponents a value has; -1 for zero, inf and NaN.
__device__ __forceinline__ int exponent_of(float v) {
  const uint32_t bits = magnitude(v);
  if (bits == 0 || bits >= 0x7f800000u) return -1;
  const int exponent = static_cast<int>(bits >> 23);
  return exponent > 0 ? exponent + 22 : 31 - __clz(static_cast<int>(bits));
}

constexpr int kRoundingRows = 32;  // of a thread block

struct RoundingGrid {
  int64_t chunks, stripes;
  RoundingGrid(int64_t rows, int64_t cols)
      : chunks(ceil_div(rows, kRoundingRows)), stripes(ceil_div(cols, kStripe)) {}
};

// A thread block has a chunk of rows and a stripe of columns of one matrix; four rows at a time as above.
// Counts of a row in a warp are below 2^10 and travel in one word.
template <typename T, QType kType, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    rounding_moments_kernel(RoundingMomentsArgs p, double* of_rows, double* of_columns) {
  constexpr int kSums = 4;
  __shared__ double sums[kSums][kRoundingRows][kWarps];
  __shared__ uint32_t counts[kRoundingRows][kWarps];
  __shared__ int exponents[kWarps][kExponents];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRoundingRows, batch = blockIdx.z;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kStripe + 8 * threadIdx.x;
  const int64_t valid = p.cols - column;
  const int count = static_cast<int>(min(static_cast<int64_t>(kRoundingRows), p.rows - row0));
  const T* x_rows = static_cast<const T*>(p.x) + batch * p.x_batch_stride + column;
  const uint8_t* data_rows = static_cast<const uint8_t*>(p.data) + batch * p.data_batch_stride + column;
  const float* scales = p.scale + batch * p.rows;
  for (int i = lane; i < kExponents; i += 32) exponents[warp][i] = 0;
  __syncwarp();
  double col_sum[8] = {}, col_square[8] = {};
  for (int r = 0; r < count; r += kTogether) {
    double sum[kSums][kTogether] = {};
    uint32_t counted[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (valid > 0 && r + i < count) {
        const int64_t row = row0 + r + i;
        Eight<T> loaded;
        if constexpr (kVector) {
          loaded.load(x_rows + row * p.x_row_stride);
        } else {
          loaded.load_part(x_rows + row * p.x_row_stride, valid);
        }
        float v[8], rounded[8];
        loaded.floats(v);
        load_rounded<kType, kVector>(rounded, data_rows + row * p.data_row_stride, valid);
        const double scale = scales[row];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (kVector || j < valid) {
            const double before = v[j], after = rounded[j] * scale, error = after - before;
            const double square = before * before;
            sum[0][i] += before;
            sum[1][i] += square;
            sum[2][i] = fma(square, square, sum[2][i]);
            sum[3][i] = fma(error, error, sum[3][i]);
            col_sum[j] += before;
            col_square[j] += square;
            counted[i] += (before != 0.0 ? 1u : 0u) + (after != 0.0 ? 1u << 10 : 0u) +
                          (fabsf(rounded[j]) >= p.largest ? 1u << 20 : 0u);
          }
        }
        if (row % p.counted == 0) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int exponent = exponent_of(v[j]);  // of what is beyond the matrix, zero, none
            if (exponent >= 0) atomicAdd(&exponents[warp][exponent], 1);
          }
        }
      }
      counted[i] = __reduce_add_sync(kAll, counted[i]);
    }
    double of_row[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) of_row[s] = sum_of_four(sum[s], lane);
    if (lane % 8 == 0) {
      const int i = lane / 8;
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s][r + i][warp] = of_row[s];
      counts[r + i][warp] = i == 0 ? counted[0] : i == 1 ? counted[1] : i == 2 ? counted[2] : counted[3];
    }
  }
  __syncthreads();
  if (threadIdx.x < count) {
    const int r = threadIdx.x;
    double* out = of_rows + (blockIdx.y * p.batch + batch) * kRoundingSums * p.rows + row0 + r;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      double total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += sums[s][r][w];
      out[s * p.rows] = total;
    }
    uint32_t total[3] = {};
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
      for (int c = 0; c < 3; ++c) total[c] += counts[r][w] >> (10 * c) & 0x3ff;
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) out[(kSums + c) * p.rows] = total[c];
  }
  for (int i = threadIdx.x; i < kExponents; i += kThreads) {
    int total = 0;
    for (int w = 0; w < kWarps; ++w) total += exponents[w][i];
    if (total > 0) atomicAdd(p.exponents + batch * kExponents + i, total);
  }
  double* out = of_columns + (blockIdx.x * p.batch + batch) * 2 * p.cols + column;
  for (int j = 0; j < 8 && j < valid; ++j) {
    out[j] = col_sum[j];
    out[p.cols + j] = col_square[j];
  }
}

constexpr int kSlices = 8;

// y[i] = the sum of x[part, i] over parts [parts, count]; of the first `maxima` values the largest instead.
__global__ void __launch_bounds__(32 * kSlices)
    combine_kernel(const double* x, double* y, int64_t parts, int64_t count, int64_t maxima) {
  __shared__ double found[kSlices][32];
  const int slice = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const auto join = [&](double a, double b) {
    if (i >= maxima) return a + b;
    return b > a || b != b ? b : a;  // NaN stays
  };
  double value = 0.0;
  if (i < count) {
#pragma unroll 4
    for (int64_t part = slice; part < parts; part += kSlices) value = join(value, x[part * count + i]);
  }
  found[slice][lane] = value;
  __syncthreads();
  if (slice > 0 || i >= count) return;
  for (int s = 1; s < kSlices; ++s) value = join(value, found[s][lane]);
  y[i] = value;
}

cudaError_t combine(const double* x, double* y, int64_t parts, int64_t count, int64_t maxima,
                    cudaStream_t stream) {
  combine_kernel<<<static_cast<unsigned>(ceil_div(count, 32)), 32 * kSlices, 0, stream>>>(x, y, parts, count,
                                                                                          maxima);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const MomentsArgs& a, cudaStream_t stream) {
  const Grid grid(a.rows, a.cols, a.device);
  const MomentsParams<T> p{static_cast<const T*>(a.x),           a.rows, a.cols, a.row_stride, a.scratch,
                           a.scratch + grid.stripes * 3 * a.rows};
  const dim3 blocks(static_cast<unsigned>(grid.stripes), static_cast<unsigned>(grid.blocks));
  if (aligned(p.x) && p.cols % 8 == 0 && p.row_stride % 8 == 0) {
    moments_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    moments_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = combine(p.of_rows, a.of_rows, grid.stripes, 3 * a.rows, a.rows, stream);
  if (error == cudaSuccess) error = combine(p.of_columns, a.of_columns, grid.blocks, 2 * a.cols, 0, stream);
  return error;
}

template <typename T, QType kType>
cudaError_t launch_rounding(const RoundingMomentsArgs& a, cudaStream_t stream) {
  const RoundingGrid grid(a.rows, a.cols);
  const int64_t row_sums = a.batch * kRoundingSums * a.rows, column_sums = a.batch * 2 * a.cols;
  double* of_rows = a.scratch;
  double* of_columns = of_rows + grid.stripes * row_sums;
  const dim3 blocks(static_cast<unsigned>(grid.chunks), static_cast<unsigned>(grid.stripes),
                    static_cast<unsigned>(a.batch));
  const auto fits = [&](const void* p, int bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<size_t>(bytes) == 0;
  };
  const int64_t strides = a.x_batch_stride | a.x_row_stride | a.data_batch_stride | a.data_row_stride;
  if (fits(a.x, 16) && fits(a.data, 8) && a.cols % 8 == 0 && strides % 8 == 0) {
    rounding_moments_kernel<T, kType, true><<<blocks, kThreads, 0, stream>>>(a, of_rows, of_columns);
  } else {
    rounding_moments_kernel<T, kType, false><<<blocks, kThreads, 0, stream>>>(a, of_rows, of_columns);
  }
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = combine(of_rows, a.of_rows, grid.stripes, row_sums, 0, stream);
  if (error == cudaSuccess) error = combine(of_columns, a.of_columns, grid.chunks, column_sums, 0, stream);
  return error;
}

}  // namespace

int64_t rounding_moments_scratch(int64_t batch, int64_t rows, int64_t cols) {
  const RoundingGrid grid(rows, cols);
  return batch * (grid.stripes * kRoundingSums * rows + grid.chunks * 2 * cols);
}

cudaError_t rounding_moments(const RoundingMomentsArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    return launch_rounding<typename decltype(input)::type, decltype(qtype)::value>(a, stream);
  });
}

int64_t moments_scratch(int64_t rows, int64_t cols, int device) {
  const Grid grid(rows, cols, device);
  return grid.stripes * 3 * rows + grid.blocks * 2 * cols;
}

cudaError_t moments(const MomentsArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return launch<__half>(a, stream);
    case DType::kFloat32:
      return launch<float>(a, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
