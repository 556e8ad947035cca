// Interface between the quantising operators (quantize_bindings.cpp, which sees PyTorch) and their kernels
// (every other file of csrc/ that includes this).

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "hadamard.h"

namespace halo_train {

enum class QType { kE4M3, kE5M2, kInt8 };

// Elements of a contraction that share a scale, where rows have a scale for each block of it: halo_train/ops/
// reference.py, SCALE_BLOCK.
constexpr int64_t kScaleBlock = 256;

// Rows of x diag(col_scale) in 8 bits, one scale a row: x is read once.
struct QuantizeRowsArgs {
  const void* x;  // [rows, cols], rows row_stride elements apart, neighbouring columns adjacent
  DType dtype;    // not kFloat64
  int64_t rows, cols, row_stride;
  const float* col_scale;  // [cols] or nullptr
  QType qtype;
  void* q;       // [rows, cols] dense
  float* scale;  // [rows]
  // One scale for the whole matrix, when not nullptr: with q the largest magnitude that scale[0] is made
  // from, without q where the largest magnitude of x is gathered, at least what is there.
  // Bits of a float; what they are of is the kernels' own business.
  uint32_t* tensor_amax;
  int device;
};
cudaError_t quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream);

// The same after a rotation of the rows in blocks of `block`, in one pass; col_scale holds positive powers of
// two. cudaErrorNotSupported where the kernels do not take it: alignments, blocks of 2 to 8, rows above
// 32768.
cudaError_t rotate_quantize(const QuantizeRowsArgs& args, int block, cudaStream_t stream);

// Where rows go that are made on the way.
struct RowsOutput {
  int64_t rows, cols;
  QType qtype;
  void* q;       // [rows, cols] dense
  float* scale;  // [rows]
  int device;
};

// Values of columns, or nullptr.
struct Vector {
  const void* data;
  DType dtype;  // not kFloat64
};

// y = (x - mean) rstd weight + bias, with mean 0 unless `center`; then y diag(col_scale) is rotated in blocks
// of `block`, 1 for none.
struct NormArgs {
  const void* x;  // [rows, cols], rows row_stride elements apart
  DType dtype;    // not kFloat64
  int64_t row_stride;
  Vector weight, bias;
  const float* col_scale;  // [cols] or nullptr; powers of two where there is a rotation
  float eps;
  bool center;
  float *mean, *rstd;  // [rows]; mean with `center`
};
// cudaErrorNotSupported as for rotate_quantize.
cudaError_t norm_quantize(const NormArgs& args, const RowsOutput& out, int block, cudaStream_t stream);
// y diag(col_scale) in float32, dense.
cudaError_t norm_rows(const NormArgs& args, int64_t rows, int64_t cols, float* y, int device,
                      cudaStream_t stream);

enum class Activation { kSilu, kGelu, kGeluTanh };

// The same of h = act(gate) up.
struct GatedArgs {
  const void *gate, *up;  // [rows, cols]
  DType dtype;            // of both, not kFloat64
  int64_t gate_stride, up_stride;
  Activation activation;
  const float* col_scale;
};
cudaError_t gated_quantize(const GatedArgs& args, const RowsOutput& out, int block, cudaStream_t stream);
cudaError_t gated_rows(const GatedArgs& args, int64_t rows, int64_t cols, float* y, int device,
                       cudaStream_t stream);

// Both 8-bit forms of a matrix; the rows may be nullptr.
struct GradForms {
  uint8_t* rows;      // [rows, cols] dense
  float* row_scales;  // [rows]
  uint8_t* columns;   // [cols, rows] dense
  float* col_scales;  // [cols]
};

// Rows of x diag(col_scale) and rows of (diag(row_scale) x)^T, one scale a row of each: x is read twice.
struct QuantizeGradArgs {
  const void* x;  // [rows, cols], as for QuantizeRowsArgs
  DType dtype;    // not kFloat64
  int64_t rows, cols, row_stride;
  const float* col_scale;  // [cols] or nullptr
  const float* row_scale;  // [rows] or nullptr
  QType qtype;
  GradForms forms;
  const float* row_divisor;  // [rows] or nullptr, of quantize_tiles
  uint32_t* amax;            // scratch, rows + cols words
  float* sums;               // [cols] sums of the columns of x on the way, or nullptr
  float* partial_sums;       // scratch for them, column_sums_scratch() floats
};
cudaError_t quantize_grad(const QuantizeGradArgs& args, cudaStream_t stream);

// The floats of QuantizeGradArgs::partial_sums.
int64_t column_sums_scratch(int64_t rows, int64_t cols);

// The same in e4m3 with scales for blocks of kScaleBlock elements: forms.row_scales [ceil(cols /
// kScaleBlock), rows] and forms.col_scales [ceil(rows / kScaleBlock), cols], powers of two. x is read once,
// amax is not used. cudaErrorNotSupported before Hopper.
cudaError_t quantize_grad_blocks(const QuantizeGradArgs& args, cudaStream_t stream);
int64_t block_sums_scratch(int64_t rows, int64_t cols);  // the floats of partial_sums here

// The columns alone, in e4m3, of (diag(row_scale / row_divisor) x diag(col_scale))^T, with a scale for each
// tile of kScaleBlock rows and columns: forms.col_scales [ceil(rows / kScaleBlock), ceil(cols /
// kScaleBlock)]. Of the arguments amax and sums are not used. cudaErrorNotSupported before Hopper.
cudaError_t quantize_tiles(const QuantizeGradArgs& args, cudaStream_t stream);

// The same of both gradients of h = act(gate) up: dh up act'(gate) and dh act(gate).
struct GatedGradArgs {
  const void *dh, *gate, *up;  // [rows, cols]
  DType dtype;                 // of all three, not kFloat64
  int64_t rows, cols, dh_stride, gate_stride, up_stride;
  Activation activation;
  const float* col_scale[2];  // of the gradients of gate and of up: [cols] or nullptr
  const float* row_scale;     // [rows]
  QType qtype;
  GradForms forms[2];
  uint32_t* amax;  // scratch, 2 (rows + cols) words
};
cudaError_t gated_grad_quantize(const GatedGradArgs& args, cudaStream_t stream);
// With scales as of quantize_grad_blocks().
cudaError_t gated_grad_blocks(const GatedGradArgs& args, cudaStream_t stream);

// y = x diag(col_scale) in float32, dense, for a rotation that comes before the rounding.
cudaError_t widen(const void* x, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                  const float* col_scale, float* y, int device, cudaStream_t stream);

// q [rows, cols] -> [cols, rows], one byte an element, both dense.
cudaError_t transpose_bytes(const void* x, void* y, int64_t rows, int64_t cols, cudaStream_t stream);

// d = 2^exponent and inverse = 2^-exponent.
cudaError_t equalizer_factors(const int8_t* exponent, float* d, float* inverse, int64_t n,
                              cudaStream_t stream);

}  // namespace halo_train
