// Interface between the operator `moments` (moments_bindings.cpp, which sees PyTorch) and its kernels.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hadamard.h"

namespace halo_train {

// Sums along both axes of a matrix that is read once.
struct MomentsArgs {
  const void* x;  // [rows, cols], rows row_stride elements apart, neighbouring columns adjacent; not empty
  DType dtype;    // not kFloat64
  int64_t rows, cols, row_stride;
  double* of_rows;     // [3, rows]: largest magnitude, sum, sum of squares
  double* of_columns;  // [2, cols]: sum, sum of squares
  double* scratch;     // moments_scratch() values
  int device;
};
cudaError_t moments(const MomentsArgs& args, cudaStream_t stream);

int64_t moments_scratch(int64_t rows, int64_t cols, int device);

}  // namespace halo_train
