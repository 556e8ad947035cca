// Interface between the quantising operators (quantize_bindings.cpp, which sees PyTorch) and their kernels
// (quantize*.cu, rotate_quantize*.cu, transpose.cu, equalizer.cu).

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hadamard.h"

namespace halo_train {

enum class QType { kE4M3, kE5M2, kInt8 };

// Rows of x diag(col_scale) in 8 bits, one scale a row: x is read once.
struct QuantizeRowsArgs {
  const void* x;  // [rows, cols], rows row_stride elements apart, neighbouring columns adjacent
  DType dtype;    // not kFloat64
  int64_t rows, cols, row_stride;
  const float* col_scale;  // [cols] or nullptr
  QType qtype;
  void* q;       // [rows, cols] dense
  float* scale;  // [rows]
  // Gathered on the way, when not nullptr: col_amax[n] = max over m of |row_scale[m] x[m, n]|, as the bits of
  // a float.
  const float* row_scale;  // [rows]
  uint32_t* col_amax;      // [cols]
  uint32_t* partial_amax;  // scratch, quantize_rows_scratch() words
  // One scale for the whole matrix, when not nullptr: with q the largest magnitude that scale[0] is made
  // from, without q where the largest magnitude of x is gathered, at least what is there. Not with row_scale.
  // Bits of a float; what they are of is the kernels' own business.
  uint32_t* tensor_amax;
  int device;
};
cudaError_t quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream);

// The 32-bit words of QuantizeRowsArgs::partial_amax.
int64_t quantize_rows_scratch(int64_t cols, int device);

// The same after a rotation of the rows in blocks of `block`, in one pass, where can_rotate_quantize();
// col_scale holds positive powers of two.
bool can_rotate_quantize(const QuantizeRowsArgs& args, int block);
cudaError_t rotate_quantize(const QuantizeRowsArgs& args, int block, cudaStream_t stream);

// Rows of (diag(row_scale) x)^T in 8 bits, one scale a row of the result, given the largest magnitudes of its
// rows.
struct QuantizeTransposedArgs {
  const void* x;
  DType dtype;
  int64_t rows, cols, row_stride;
  const float* row_scale;  // [rows] or nullptr
  uint32_t* col_amax;      // [cols], as in QuantizeRowsArgs
  bool gather_col_amax;    // fill col_amax first, with a pass over x of its own
  QType qtype;
  void* q;              // [cols, rows] dense
  float* scale;         // [cols]
  float* sums;          // sums of the columns of x on the way, or nullptr
  float* partial_sums;  // scratch for them, column_sums_scratch() floats
  int device;
};
cudaError_t quantize_rows_transposed(const QuantizeTransposedArgs& args, cudaStream_t stream);

// The floats of QuantizeTransposedArgs::partial_sums.
int64_t column_sums_scratch(int64_t rows, int64_t cols);

// y = x diag(col_scale) in float32, dense, for a rotation that comes before the rounding.
cudaError_t widen(const void* x, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                  const float* col_scale, float* y, int device, cudaStream_t stream);

// q [rows, cols] -> [cols, rows], one byte an element, both dense.
cudaError_t transpose_bytes(const void* x, void* y, int64_t rows, int64_t cols, cudaStream_t stream);

// d = 2^exponent and inverse = 2^-exponent.
cudaError_t equalizer_factors(const int8_t* exponent, float* d, float* inverse, int64_t n,
                              cudaStream_t stream);

}  // namespace halo_train
