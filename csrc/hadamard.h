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
  int block;  // order times a power of two: at most 32768, with a matrix 64 to 512, of order 20 to 32 to 1024
  double scale;
  int device;
};

// Enqueues the transform.
cudaError_t hadamard(const HadamardArgs& args, cudaStream_t stream);

// y = scale * x diag(first) (I kron H) diag(middle) (I kron H) diag(last) over rows of `axis` elements,
// rounded once.
struct HadamardRoundsArgs {
  const void* x;  // as in HadamardArgs
  void* y;
  const uint8_t*
      first;  // a bit for each index of the axis, set where the sign is minus, 8-byte aligned; or nullptr
  const uint8_t* middle;  // likewise, never nullptr
  const uint8_t* last;    // likewise
  DType dtype;            // not float64
  int64_t total;          // elements of x, not zero
  int64_t axis;
  int64_t row_stride;
  int block;  // power of two from 64 to 32768 that divides axis
  double scale;
  int device;
};

cudaError_t hadamard_rounds(const HadamardRoundsArgs& args, cudaStream_t stream);

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

template <typename T>
cudaError_t launch_hadamard_rounds(const HadamardRoundsArgs& args, cudaStream_t stream);

}  // namespace detail

}  // namespace halo_train
