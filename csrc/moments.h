// Interface between the operators `moments` and `rounding_moments` (moments_bindings.cpp, which sees PyTorch)
// and their kernels.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantize.h"

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

// Sums of matrices and of what rounding left of them, both read once.
struct RoundingMomentsArgs {
  const void* x;  // [batch, rows, cols], neighbouring columns adjacent; not empty
  DType dtype;    // not kFloat64
  int64_t x_batch_stride, x_row_stride;
  const void* data;  // [batch, rows, cols] likewise
  QType qtype;
  int64_t data_batch_stride, data_row_stride;
  const float* scale;  // [batch, rows]
  float largest;       // magnitude from which on data counts as saturated
  int64_t counted;     // every so manieth row has its exponents counted
  int64_t batch, rows, cols;
  double* of_rows;     // [batch, kRoundingSums, rows]: see ops/reference.py
  double* of_columns;  // [batch, 2, cols]: sum, sum of squares
  int32_t* exponents;  // [batch, kExponents], zeros before
  double* scratch;     // rounding_moments_scratch() values
};
constexpr int kRoundingSums = 7;
constexpr int kExponents = 277;  // of the binary orders of float32, from that of the smallest value on
cudaError_t rounding_moments(const RoundingMomentsArgs& args, cudaStream_t stream);

int64_t rounding_moments_scratch(int64_t batch, int64_t rows, int64_t cols);

}  // namespace halo_train
