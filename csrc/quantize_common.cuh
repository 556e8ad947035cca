// What the quantising kernels share: access to eight neighbouring elements at a time, the launch's view of a
// matrix, and dispatch on types.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "occupancy.cuh"
#include "round.cuh"

namespace halo_train::detail {

// Eight neighbouring elements, as loaded.
template <typename T>
struct Eight {
  static constexpr int kWords = 2 * sizeof(T);
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
    }
  }
  // Any alignment, at most `count` elements, zeros beyond.
  __device__ __forceinline__ void load_part(const T* p, int64_t count) {
    T* element = reinterpret_cast<T*>(word);
#pragma unroll
    for (int i = 0; i < 8; ++i) element[i] = i < count ? p[i] : T(0.0f);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
  }
  __device__ __forceinline__ void floats(float (&v)[8]) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // an operation each instead of three for two
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
      }
    } else {
      const T* element = reinterpret_cast<const T*>(word);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = static_cast<float>(element[i]);
    }
  }
};

// Eight float factors that belong to neighbouring columns; ones where there are none.
template <bool kVector>
__device__ __forceinline__ void load_factors(float (&f)[8], const float* factors, int64_t column,
                                             int64_t cols) {
  if (factors == nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) f[j] = 1.0f;
  } else if constexpr (kVector) {
    const float4 lo = __ldg(reinterpret_cast<const float4*>(factors + column));
    const float4 hi = __ldg(reinterpret_cast<const float4*>(factors + column) + 1);
    f[0] = lo.x, f[1] = lo.y, f[2] = lo.z, f[3] = lo.w, f[4] = hi.x, f[5] = hi.y, f[6] = hi.z, f[7] = hi.w;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) f[j] = column + j < cols ? __ldg(factors + column + j) : 1.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void store8(uint8_t* p, uint2 bytes, int64_t count) {
  if constexpr (kVector) {
    *reinterpret_cast<uint2*>(p) = bytes;
  } else {
    const uint8_t* byte = reinterpret_cast<const uint8_t*>(&bytes);
    for (int j = 0; j < 8 && j < count; ++j) p[j] = byte[j];
  }
}

// Rows `stride` elements apart, neighbouring columns adjacent.
template <typename T>
struct Matrix {
  const T* x;
  int64_t stride;
};

// The same of any type and alignment, an element at a time.
struct AnyMatrix {
  const void* x;
  DType dtype;
  int64_t stride;

  __device__ __forceinline__ float element(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    if (dtype == DType::kFloat32) return static_cast<const float*>(x)[i];
    return dtype == DType::kBFloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i])
                                     : __half2float(static_cast<const __half*>(x)[i]);
  }
};

// Eight columns of a row, zeros outside of [rows, cols].
template <bool kVector, typename T>
__device__ __forceinline__ void load_columns(Eight<T>& v, const Matrix<T>& m, int64_t row, int64_t column,
                                             int64_t rows, int64_t cols) {
  if (row >= rows || column >= cols) {
    v.clear();
  } else if constexpr (kVector) {
    v.load(m.x + row * m.stride + column);
  } else {
    v.load_part(m.x + row * m.stride + column, cols - column);
  }
}

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Thread blocks over tiles of a matrix: x across the columns, y and z down the rows, of which a launch allows
// 65535 each.
inline dim3 tile_grid(int64_t across, int64_t down) {
  const int64_t y = std::min<int64_t>(down, 65535);
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(y),
              static_cast<unsigned>(ceil_div(down, y)));
}
__device__ __forceinline__ int64_t block_down() {
  return blockIdx.z * static_cast<int64_t>(gridDim.y) + blockIdx.y;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether eight columns are one 16-byte access to 16-bit values (two to 32-bit ones).
template <typename T>
bool vectorised(const Matrix<T>& m, int64_t cols) {
  return aligned(m.x) && cols % 8 == 0 && m.stride % 8 == 0;
}

template <typename T>
struct Input {
  using type = T;
};

// Calls f(Input<T>{}, std::integral_constant<QType, ...>{}) for the types that are asked for.
template <typename T, typename F>
cudaError_t dispatch_qtype(QType qtype, const F& f) {
  switch (qtype) {
    case QType::kE4M3:
      return f(Input<T>{}, std::integral_constant<QType, QType::kE4M3>{});
    case QType::kE5M2:
      return f(Input<T>{}, std::integral_constant<QType, QType::kE5M2>{});
    case QType::kInt8:
      return f(Input<T>{}, std::integral_constant<QType, QType::kInt8>{});
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t dispatch(DType dtype, QType qtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return dispatch_qtype<__nv_bfloat16>(qtype, f);
    case DType::kFloat16:
      return dispatch_qtype<__half>(qtype, f);
    case DType::kFloat32:
      return dispatch_qtype<float>(qtype, f);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train::detail
