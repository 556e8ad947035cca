// What the bindings of the quantising operators share.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "binding_helpers.h"
#include "quantize.h"

namespace halo_train {

struct Quantised {
  QType type;
  int32_t dtype_code;
};

inline Quantised quantised_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn:
      return {QType::kE4M3, aoti_torch_dtype_float8_e4m3fn()};
    case ScalarType::Float8_e5m2:
      return {QType::kE5M2, aoti_torch_dtype_float8_e5m2()};
    case ScalarType::Char:
      return {QType::kInt8, aoti_torch_dtype_int8()};
    default:
      break;
  }
  STD_TORCH_CHECK(false, "halo_train: dtype must be float8_e4m3fn, float8_e5m2 or int8");
}

inline DType input_type(const Tensor& x) {
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype && *dtype != DType::kFloat64,
                  "halo_train: x must be bfloat16, float16 or float32 to be quantised on a GPU");
  return *dtype;
}

// A matrix whose neighbouring columns are adjacent; its rows may be apart.
inline Tensor with_dense_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "halo_train: x must be a matrix");
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// n float32 values on the device of x.
inline Tensor factors_of(const Tensor& v, int64_t n, const Tensor& x) {
  STD_TORCH_CHECK(v.numel() == n && v.is_cuda() && v.get_device_index() == x.get_device_index(),
                  "halo_train: scales must have one value for each row or column, on the device of x");
  return dense(v, ScalarType::Float);
}

inline Tensor empty_floats(const std::vector<int64_t>& sizes, const Tensor& like) {
  return empty(sizes, like, aoti_torch_dtype_float32());
}

inline Tensor empty_words(int64_t count, const Tensor& like) {
  return empty({count}, like, aoti_torch_dtype_int32());
}

// 8-bit data [rows, cols] and its row scales; the scales of rows without elements are 1.
struct FormPair {
  FormPair(int64_t rows, int64_t cols, const Tensor& like, const Quantised& quantised)
      : FormPair(rows, cols, {rows}, like, quantised) {
    if (cols == 0) torch::stable::fill_(scale, 1.0);
  }
  // With a scale for each block of each row: [blocks, rows].
  static FormPair of_blocks(int64_t rows, int64_t cols, const Tensor& like, const Quantised& quantised) {
    return FormPair(rows, cols, {blocks_of(cols), rows}, like, quantised);
  }
  // With a scale for each tile of kScaleBlock rows and columns: [blocks, tiles].
  static FormPair of_tiles(int64_t rows, int64_t cols, const Tensor& like, const Quantised& quantised) {
    return FormPair(rows, cols, {blocks_of(cols), blocks_of(rows)}, like, quantised);
  }
  uint8_t* bytes() const { return static_cast<uint8_t*>(data.data_ptr()); }
  float* floats() const { return static_cast<float*>(scale.data_ptr()); }

  Tensor data, scale;

 private:
  static int64_t blocks_of(int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; }
  FormPair(int64_t rows, int64_t cols, const std::vector<int64_t>& scales, const Tensor& like,
           const Quantised& quantised)
      : data(empty({rows, cols}, like, quantised.dtype_code)), scale(empty_floats(scales, like)) {}
};

// Of kernels that run in clusters of thread blocks.
inline void check_cluster_launch(const char* op, cudaError_t error, int device) {
  STD_TORCH_CHECK(error != cudaErrorNotSupported, "halo_train::", op,
                  ": scales for blocks need a GPU of compute capability 9.0 or later; use one scale a row");
  check_launch(op, error, device);
}

inline void check_block(const char* op, int64_t block, int64_t cols) {
  STD_TORCH_CHECK(block > 0 && block <= 32768 && (block & (block - 1)) == 0 && cols % block == 0,
                  "halo_train::", op,
                  ": block must be a power of two, at most 32768, that divides the columns");
}

// Dense float32 rows, rotated in place.
inline void rotate_floats(const char* op, const Tensor& y, int64_t block) {
  const int device = y.get_device_index();
  HadamardArgs args{};
  args.x = y.data_ptr();
  args.y = y.data_ptr();
  args.dtype = DType::kFloat32;
  args.total = y.numel();
  args.axis = y.size(1);
  args.row_stride = y.size(1);
  args.block = static_cast<int>(block);
  args.scale = 1.0 / std::sqrt(static_cast<double>(block));
  args.device = device;
  check_launch(op, hadamard(args, current_stream(device)), device);
}

}  // namespace halo_train
