// Gradients in both 8-bit forms, rows of G diag(col_scale) and rows of (diag(row_scale) G)^T, one scale a row
// of each: one pass gathers the largest magnitudes of the rows and the columns, a second rounds. G is a
// matrix or the gradients of a gated activation, which each pass works out anew from its inputs (GradSource).
// Numerics as in quantize.cu.

#pragma once

#include "activation.cuh"
#include "quantize_common.cuh"
#include "transpose_tile.cuh"

namespace halo_train::detail {

// Eight columns of a row of a Matrix, whose rows are aligned vectors, or of AnyMatrix; zeros outside.
template <typename T>
__device__ __forceinline__ void load_grad(Eight<T>& v, const Matrix<T>& m, int64_t row, int64_t column,
                                          int64_t rows, int64_t cols) {
  load_columns<true>(v, m, row, column, rows, cols);
}
__device__ __forceinline__ void load_grad(Eight<float>& v, const AnyMatrix& m, int64_t row, int64_t column,
                                          int64_t rows, int64_t cols) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool inside = row < rows && column + i < cols;
    v.word[i] = inside ? __float_as_uint(m.element(row, column + i)) : 0;
  }
}

template <typename M>
struct Loaded {
  using type = Eight<float>;
};
template <typename T>
struct Loaded<Matrix<T>> {
  using type = Eight<T>;
};

// G itself.
template <typename M>
struct PlainGrad {
  static constexpr int kInputs = 1, kOutputs = 1, kBatch = 4, kMinBlocks = 3;
  static constexpr bool kVector = !std::is_same_v<M, AnyMatrix>;
  struct Raw {
    typename Loaded<M>::type x;
  };
  M x;

  __device__ __forceinline__ const M& input(int) const { return x; }
  static __device__ __forceinline__ typename Loaded<M>::type& eight(Raw& raw, int) { return raw.x; }

  __device__ __forceinline__ void load(Raw& raw, int64_t row, int64_t column, int64_t rows,
                                       int64_t cols) const {
    load_grad(raw.x, x, row, column, rows, cols);
  }
  __device__ __forceinline__ void values(float (&v)[1][8], const Raw& raw) const { raw.x.floats(v[0]); }
};

// dgate = dh up act'(gate) and dup = dh act(gate).
template <typename M, typename Act>
struct GatedGrad {
  static constexpr int kInputs = 3, kOutputs = 2, kBatch = 2, kMinBlocks = 3;
  static constexpr bool kVector = !std::is_same_v<M, AnyMatrix>;
  struct Raw {
    typename Loaded<M>::type dh, gate, up;
  };
  M dh, gate, up;
  Act activation;

  __device__ __forceinline__ const M& input(int i) const { return i == 0 ? dh : i == 1 ? gate : up; }
  static __device__ __forceinline__ typename Loaded<M>::type& eight(Raw& raw, int i) {
    return i == 0 ? raw.dh : i == 1 ? raw.gate : raw.up;
  }

  __device__ __forceinline__ void load(Raw& raw, int64_t row, int64_t column, int64_t rows,
                                       int64_t cols) const {
    load_grad(raw.dh, dh, row, column, rows, cols);
    load_grad(raw.gate, gate, row, column, rows, cols);
    load_grad(raw.up, up, row, column, rows, cols);
  }
  __device__ __forceinline__ void values(float (&v)[2][8], const Raw& raw) const {
    float e[8], g[8], u[8];
    raw.dh.floats(e);
    raw.gate.floats(g);
    raw.up.floats(u);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float value, derivative;
      activation.value_and_derivative(g[j], value, derivative);
      v[0][j] = e[j] * u[j] * derivative;
      v[1][j] = e[j] * value;
    }
  }
};

template <typename Source>
struct GradParams {
  static constexpr int kOutputs = Source::kOutputs;
  Source source;
  int64_t rows, cols;
  const float* row_scale;    // [rows] or nullptr
  const float* row_divisor;  // the same; of quantize_tiles
  const float* col_scale[kOutputs];
  uint32_t *row_amax, *col_amax;  // [kOutputs, rows], [kOutputs, cols]
  GradForms forms[kOutputs];
  float* partial_sums;  // of the columns: [thread blocks down, cols]
};

// A kernel that is launched early (Hopper and later) begins while the one before it ends: from when all
// thread blocks of that one have called start_next_kernel() to when this one calls wait_for_last_kernel().
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
inline bool launches_early() {
  static std::atomic<int> known[kCachedDevices];
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (device < kCachedDevices) major = known[device].load(std::memory_order_relaxed);
  if (major == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
      return false;
    if (device < kCachedDevices) known[device].store(major, std::memory_order_relaxed);
  }
  return major >= 9;
}
template <typename P>
cudaError_t launch_early(void (*kernel)(P), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                         const P& params) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = launches_early() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

constexpr int kAmaxWarps = 4, kAmaxColumns = 256;

// A warp takes 32 rows of 256 columns, a lane eight neighbouring columns.
template <typename Source, bool kRows>
__global__ void __launch_bounds__(32 * kAmaxWarps) grad_amax_kernel(const GradParams<Source> p) {
  constexpr int kOutputs = Source::kOutputs, kBatch = Source::kBatch;
  constexpr bool kVector = Source::kVector;
  __shared__ float col_best[kOutputs][kAmaxWarps][kAmaxColumns];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kAmaxColumns, column = col0 + 8 * lane;
  const int64_t first = (block_down() * kAmaxWarps + warp) * 32;
  const float row_factors =
      p.row_scale != nullptr && first + lane < p.rows ? __ldg(p.row_scale + first + lane) : 1.0f;
  float t[kOutputs][8], best[kOutputs][8] = {};
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    load_factors<kVector>(t[o], column < p.cols ? p.col_scale[o] : nullptr, column, p.cols);
  }
  uint32_t mine[kOutputs] = {};  // of row `lane`
  start_next_kernel();
  typename Source::Raw next[kBatch];
  const auto load = [&](int r0) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) p.source.load(next[b], first + r0 + b, column, p.rows, p.cols);
  };
  load(0);
#pragma unroll 2
  for (int r0 = 0; r0 < 32 && first + r0 < p.rows; r0 += kBatch) {
    typename Source::Raw raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) raw[b] = next[b];
    if (r0 + kBatch < 32) load(r0 + kBatch);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float v[kOutputs][8];
      p.source.values(v, raw[b]);
      const float s = __shfl_sync(0xffffffffu, row_factors, r0 + b);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        float row_best = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          best[o][j] = max_nan(best[o][j], fabsf(v[o][j] * s));
          row_best = max_nan(row_best, fabsf(v[o][j] * t[o][j]));
        }
        if constexpr (kRows) {
          const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(row_best));
          if (lane == r0 + b) mine[o] = largest;
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    if (kRows && first + lane < p.rows) atomicMax(p.row_amax + o * p.rows + first + lane, mine[o]);
    float4* to = reinterpret_cast<float4*>(col_best[o][warp] + 8 * lane);
    to[0] = make_float4(best[o][0], best[o][1], best[o][2], best[o][3]);
    to[1] = make_float4(best[o][4], best[o][5], best[o][6], best[o][7]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kOutputs * kAmaxColumns; i += 32 * kAmaxWarps) {
    const int o = i / kAmaxColumns, c = i % kAmaxColumns;
    if (col0 + c >= p.cols) continue;
    float largest = col_best[o][0][c];
#pragma unroll
    for (int w = 1; w < kAmaxWarps; ++w) largest = max_nan(largest, col_best[o][w][c]);
    atomicMax(p.col_amax + o * p.cols + col0 + c, __float_as_uint(largest));
  }
}

constexpr int kGradRows = 128;  // of a tile

__device__ __forceinline__ void read8(float (&f)[8], const float4* from) {
  const float4 lo = from[0], hi = from[1];
  f[0] = lo.x, f[1] = lo.y, f[2] = lo.z, f[3] = lo.w, f[4] = hi.x, f[5] = hi.y, f[6] = hi.z, f[7] = hi.w;
}

// What a thread of round_grad_kernel reads next, four rows of eight columns of each input, on its way to
// shared memory, where nobody else looks; of AnyMatrix it is loaded when it is wanted.
template <typename Source, int kThreads>
struct GradStage {
  static constexpr int kQuads = sizeof(typename Source::Raw) / 16 / Source::kInputs;  // of eight elements
  static constexpr size_t kBytes = Source::kVector ? 4 * sizeof(typename Source::Raw) * kThreads : 0;
  uint4* const memory;

  __device__ __forceinline__ uint4* slot(int row, int input, int quad) const {
    return memory + ((row * Source::kInputs + input) * kQuads + quad) * kThreads;
  }
  // Row r of the four; zeros outside.
  __device__ __forceinline__ void start(const GradParams<Source>& p, int r, int64_t row,
                                        int64_t column) const {
    if constexpr (Source::kVector) {
#pragma unroll
      for (int i = 0; i < Source::kInputs; ++i) {
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          const auto& m = p.source.input(i);
          if (row < p.rows && column < p.cols) {
            const auto* from = reinterpret_cast<const uint4*>(m.x + row * m.stride + column) + k;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                             static_cast<uint32_t>(__cvta_generic_to_shared(slot(r, i, k)))),
                         "l"(from)
                         : "memory");
          } else {
            *slot(r, i, k) = make_uint4(0, 0, 0, 0);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void read(typename Source::Raw& raw, const GradParams<Source>& p, int r,
                                       int64_t row, int64_t column) const {
    if constexpr (Source::kVector) {
#pragma unroll
      for (int i = 0; i < Source::kInputs; ++i) {
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          const uint4 w = *slot(r, i, k);
          uint32_t* to = Source::eight(raw, i).word + 4 * k;
          to[0] = w.x, to[1] = w.y, to[2] = w.z, to[3] = w.w;
        }
      }
    } else {
      p.source.load(raw, row, column, p.rows, p.cols);
    }
  }
};

// kRows: the rows are written too. kTiles: down the rows, the next one on its way meanwhile. kSum: sums of
// the columns of G, in an order that is always the same.
template <typename Source, QType kType, bool kRows, bool kSum, int kTiles>
__global__ void __launch_bounds__(Tile<kGradRows>::kThreads, Source::kMinBlocks)
    round_grad_kernel(const GradParams<Source> p) {
  using L = Tile<kGradRows>;
  constexpr int kOutputs = Source::kOutputs, kColumns = 8 * kGroups;
  constexpr bool kVector = Source::kVector;
  constexpr int kWidth = kVector ? 16 : 1;  // bytes of a store along the columns
  __shared__ __align__(16) uint32_t tile[kOutputs][kColumns * L::kWords];
  __shared__ float row_scales[kTiles * kGradRows], row_inverses[kRows ? kOutputs : 1][kTiles * kGradRows];
  __shared__ float4 col_scales[kOutputs][kColumns / 4], col_inverses[kOutputs][kColumns / 4];
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kColumns, column = col0 + 8 * group;
  // Upwards: the L2 cache still holds what the first pass read last.
  const int64_t down = ceil_div(p.rows, kTiles * kGradRows) - 1 - block_down();
  if (down < 0) return;
  const int64_t first = down * kTiles * kGradRows;
  extern __shared__ uint4 stage_memory[];
  const GradStage<Source, L::kThreads> stage{stage_memory + threadIdx.x};
#pragma unroll
  for (int r = 0; r < 4; ++r) stage.start(p, r, first + 4 * word + r, column);
  wait_for_last_kernel();
  for (int i = threadIdx.x; i < kTiles * kGradRows; i += L::kThreads) {
    const int64_t row = first + i;
    const bool inside = row < p.rows;
    row_scales[i] = inside && p.row_scale != nullptr ? __ldg(p.row_scale + row) : 1.0f;
    if constexpr (kRows) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const uint32_t amax = inside ? __ldcg(p.row_amax + o * p.rows + row) : 0;
        row_inverses[o][i] = inverse_of<kType>(amax);
        if (inside && blockIdx.x == 0) p.forms[o].row_scales[row] = scale_of<kType>(amax);
      }
    }
  }
  if (threadIdx.x < kColumns) {
    const int c = threadIdx.x;
    const bool inside = col0 + c < p.cols;
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const uint32_t amax = inside ? __ldcg(p.col_amax + o * p.cols + col0 + c) : 0;
      reinterpret_cast<float*>(col_inverses[o])[c] = inverse_of<kType>(amax);
      if constexpr (kRows) {
        const float* scales = p.col_scale[o];
        reinterpret_cast<float*>(col_scales[o])[c] =
            inside && scales != nullptr ? __ldg(scales + col0 + c) : 1.0f;
      }
      if (inside && down == 0) p.forms[o].col_scales[col0 + c] = scale_of<kType>(amax);
    }
  }
  __syncthreads();
  float sum[8] = {};
#pragma unroll 1
  for (int t = 0; t < kTiles; ++t) {
    const int64_t row0 = first + t * kGradRows;
    if (row0 >= p.rows) break;
    asm volatile("cp.async.wait_all;" ::: "memory");
    uint32_t words[kOutputs][8];
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      float v[2][kOutputs][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        typename Source::Raw raw;
        stage.read(raw, p, r + h, row0 + 4 * word + r + h, column);
        p.source.values(v[h], raw);
        if (t + 1 < kTiles) stage.start(p, r + h, row0 + kGradRows + 4 * word + r + h, column);
      }
      const int row = t * kGradRows + 4 * word + r;
      const float s[2] = {row_scales[row], row_scales[row + 1]};
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if constexpr (kRows) {
          float f[8];
          read8(f, col_scales[o] + 2 * group);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float inverse = row_inverses[o][row + h];
            float w[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) w[j] = v[h][o][j] * f[j] * inverse;
            if (first + row + h < p.rows && column < p.cols) {
              const uint2 bytes = {round4<kType>(w[0], w[1], w[2], w[3]),
                                   round4<kType>(w[4], w[5], w[6], w[7])};
              store8<kVector>(p.forms[o].rows + (first + row + h) * p.cols + column, bytes, p.cols - column);
            }
          }
        }
        float inverse[8];
        read8(inverse, col_inverses[o] + 2 * group);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if constexpr (kSum) sum[j] += v[0][o][j] + v[1][o][j];
          const uint32_t pair = round2<kType>(v[0][o][j] * s[0] * inverse[j], v[1][o][j] * s[1] * inverse[j]);
          words[o][j] = r == 0 ? pair : __byte_perm(words[o][j], pair, 0x5410);
        }
      }
    }
    if (t > 0) __syncthreads();  // the tile before has been read
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int j = 0; j < 8; ++j) tile[o][L::slot(8 * group + j, word, group)] = words[o][j];
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      store_tile<kGradRows, 8, kWidth>(tile[o], p.forms[o].columns, p.rows, p.cols, row0, col0);
    }
  }
  if constexpr (kSum) {
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(tile[0]);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[(8 * group + j) * L::kWords + (word ^ group << 2)] = sum[j];
    __syncthreads();
    constexpr int kParts = L::kThreads / kColumns, kEach = L::kWords / kParts;  // threads of a column
    const int mine = threadIdx.x / kParts, part = threadIdx.x % kParts;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kEach; ++w) total += sums[mine * L::kWords + part * kEach + (w ^ mine % kEach)];
#pragma unroll
    for (int lanes = 1; lanes < kParts; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    if (part == 0 && col0 + mine < p.cols) p.partial_sums[down * p.cols + col0 + mine] = total;
  }
}

template <typename Source, bool kRows>
cudaError_t gather_grad_amax(const GradParams<Source>& p, cudaStream_t stream) {
  // Both are parts of one allocation, the rows before the columns.
  const int64_t words = Source::kOutputs * (p.cols + (kRows ? p.rows : 0));
  const cudaError_t error =
      cudaMemsetAsync(kRows ? p.row_amax : p.col_amax, 0, sizeof(uint32_t) * words, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid = tile_grid(ceil_div(p.cols, kAmaxColumns), ceil_div(p.rows, 32 * kAmaxWarps));
  grad_amax_kernel<Source, kRows><<<grid, 32 * kAmaxWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename Source, QType kType, bool kRows, bool kSum, int kTiles>
cudaError_t round_grad(const GradParams<Source>& p, cudaStream_t stream) {
  constexpr auto kKernel = round_grad_kernel<Source, kType, kRows, kSum, kTiles>;
  constexpr int kThreads = Tile<kGradRows>::kThreads;
  constexpr size_t kShared = GradStage<Source, kThreads>::kBytes;
  if constexpr (kShared > 16 * 1024) {  // with what the kernel declares itself more than needs no asking
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kShared));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid = tile_grid(ceil_div(p.cols, 8 * kGroups), ceil_div(p.rows, kGradRows * kTiles));
  return launch_early(kKernel, grid, kThreads, kShared, stream, p);
}

// Whether the kernels take a matrix as vectors. Rows are a multiple of 16 wherever speed matters: HaloLinear
// pads them.
template <typename T>
bool grad_vectors(const Matrix<T>& m, int64_t rows, int64_t cols) {
  return vectorised(m, cols) && rows % 16 == 0;
}

}  // namespace halo_train::detail
