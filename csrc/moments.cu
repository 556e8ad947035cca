// Largest magnitude, sum and sum of squares of every row and column of a matrix, at the speed of memory.
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

}  // namespace

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
