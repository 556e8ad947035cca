// Interface between the operator (bindings.cpp, which sees PyTorch) and the kernels (*.cu, which do not).

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace halo_train {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64 };

// y = scale * (x diag(signs)) (I kron H) diag(out_scale) over rows of `axis` elements. H is the Sylvester
// matrix of order `block`, or matrix^T kron the one of order block / order.
struct HadamardArgs {
  const void* x;      // 16-byte aligned, rows row_stride elements apart (a multiple of 16 bytes unless dense)
  void* y;            // 16-byte aligned, dense; may be x when x is dense
  const void* signs;  // [axis] of x's dtype, 16-byte aligned, or nullptr; only the sign bit is used
  const void* out_scale;  // [axis] of float (double where x is), 16-byte aligned, or nullptr
  DType dtype;
  int64_t total;  // elements of x, not zero
  // Elements in a row; a multiple of 16 bytes when signs or factors are given or x is not dense.
  int64_t axis;
  int64_t row_stride;
  // [order, order] of x's dtype, 16 bits, 8-byte aligned; nullptr where order is 1.
  const void* matrix;
  int order;
  int block;  // order times a power of two: at most 32768, with a matrix 64 to 512
  double scale;
  int device;
};

// Enqueues the transform.
cudaError_t hadamard(const HadamardArgs& args, cudaStream_t stream);

// y = scale * the blocks of `block` rows of (diag(signs) x) transformed along the axis, for dense x [outer,
// axis, inner].
struct HadamardColumnsArgs {
  const void* x;       // 8-byte aligned, as y; not float64
  void* y;             // another tensor
  const float* signs;  // [axis] or nullptr
  void* middle;        // float[outer * axis * inner] where needed, 8-byte aligned
  DType dtype;
  int64_t outer, axis, inner;  // inner is even
  int block;                   // power of two from 2 to 32768 that divides axis
  double scale;
  int device;
};

bool hadamard_columns_needs_middle(int block);
cudaError_t hadamard_columns(const HadamardColumnsArgs& args, cudaStream_t stream);

namespace detail {

template <typename T>
cudaError_t launch_hadamard(const HadamardArgs& args, cudaStream_t stream);

template <typename T>
cudaError_t launch_hadamard_matrix(const HadamardArgs& args, cudaStream_t stream);

}  // namespace detail

}  // namespace halo_train
