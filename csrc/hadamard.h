// Interface between the operator (bindings.cpp, which sees PyTorch) and the kernels (*.cu, which do not).

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace halo_train {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64 };

// y = scale * (x diag(signs)) (I kron H_block) over rows of `axis` elements.
struct HadamardArgs {
  const void* x;      // 16-byte aligned, rows row_stride elements apart (a multiple of 16 bytes unless dense)
  void* y;            // 16-byte aligned, dense; may be x when x is dense
  const void* signs;  // [axis] of x's dtype, 16-byte aligned, or nullptr; only the sign bit is used
  DType dtype;
  int64_t total;  // elements of x, not zero
  int64_t axis;   // elements in a row; a multiple of 16 bytes when signs are given or x is not dense
  int64_t row_stride;
  int block;  // power of two that divides axis, at most 32768
  double scale;
  int device;
};

// Enqueues the transform.
cudaError_t hadamard(const HadamardArgs& args, cudaStream_t stream);

namespace detail {

template <typename T>
cudaError_t launch_hadamard(const HadamardArgs& args, cudaStream_t stream);

}  // namespace detail

}  // namespace halo_train
