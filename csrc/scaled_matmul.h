// The 8-bit matrix product with row scales on Hopper. See scaled_matmul_kernel.cuh.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantize.h"

namespace halo_train {

// The longest contraction whose sums cannot leave int32: 127 * 127 * 2^17 < 2^31.
constexpr int64_t kInt8MaxContraction = 131072;

struct ScaledProduct {
  QType type;     // of a and b, kInt8 or kE4M3
  const void* a;  // [m, k]
  const void* b;  // [n, k]
  void* c;        // [m, n], bfloat16, float16 or float32
  int64_t a_stride, b_stride;
  int64_t m, n, k;
  // One a row, or one for all, or [ceil(k / kScaleBlock), m], powers of two: one for each row and block of
  // the contraction; scale_b then also [ceil(k / kScaleBlock), ceil(n / kScaleBlock)], powers of two: one for
  // each tile of kScaleBlock rows and elements of the contraction. The sums are taken from one block's scale
  // to the next's: a scale that is 2^127 times the next makes what is not finite, and 2^95 times may.
  const float* scale_a;
  const float* scale_b;
  bool rows_a, rows_b;  // one a row
  bool blocks_a;        // with rows_a, one a row and block; kE4M3
  bool tiles_b;         // with blocks_a, one a tile
  DType dtype;          // of c
  int device;
};

// Whether the product has a tile for every multiprocessor. With fewer, other libraries split contractions of
// float8, which is faster there, and more accurate.
bool fills_gpu(int64_t m, int64_t n, int device);

// c = diag(scale_a) (a b^T) diag(scale_b), c dense. Addresses and strides must be multiples of 16, as must n.
cudaError_t scaled_matmul(const ScaledProduct& product, cudaStream_t stream);

}  // namespace halo_train
