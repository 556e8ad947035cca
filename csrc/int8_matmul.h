// The int8 matrix product with row scales on Hopper. See int8_matmul_kernel.cuh.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hadamard.h"

namespace halo_train {

// The longest contraction whose sums cannot leave int32: 127 * 127 * 2^17 < 2^31.
constexpr int64_t kInt8MaxContraction = 131072;

struct Int8Product {
  const void* a;  // [m, k]
  const void* b;  // [n, k]
  void* c;        // [m, n], bfloat16, float16 or float32
  int64_t a_stride, b_stride;
  int64_t m, n, k;
  const float* scale_a;  // one a row, or one for all
  const float* scale_b;
  bool rows_a, rows_b;  // one a row
  DType dtype;
  int device;
};

// c = diag(scale_a) (a b^T) diag(scale_b), c dense. Addresses and strides must be multiples of 16, as must n.
cudaError_t int8_matmul(const Int8Product& product, cudaStream_t stream);

}  // namespace halo_train
