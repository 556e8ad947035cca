// Rotating and rounding in one pass: which inputs the kernels take, and which kernels they go to
// (rotate_quantize_launch.cuh, one translation unit for each type).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quantize.h"

namespace halo_train {

namespace detail {

// Bytes of shared memory of a row at most: float32 values that warps exchange, and column factors.
int64_t rotate_quantize_shared(int64_t cols, int block, bool scaled) {
  const int64_t tiles = (cols + 2047) / 2048 * 2048;
  return (block > 2048 ? 4 * tiles : 0) + (scaled ? 2 * tiles : 0);
}

template <typename T>
cudaError_t launch_rotate_quantize(const QuantizeRowsArgs& args, int block, cudaStream_t stream);

}  // namespace detail

namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool can_rotate_quantize(const QuantizeRowsArgs& a, int block) {
  // What else there is takes two passes: e5m2 is for gradients, which are not rotated along their rows, and
  // HaloLinear pads rows to multiples of 16.
  if (a.qtype == QType::kE5M2 || a.cols > 32768 || block < 16 || a.row_stride % 8 != 0 || !aligned(a.x) ||
      !aligned(a.q) || (a.col_scale != nullptr && !aligned(a.col_scale))) {
    return false;
  }
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, a.device);
  return detail::rotate_quantize_shared(a.cols, block, a.col_scale != nullptr) + 1024 <= limit;
}

cudaError_t rotate_quantize(const QuantizeRowsArgs& a, int block, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::kBFloat16:
      return detail::launch_rotate_quantize<__nv_bfloat16>(a, block, stream);
    case DType::kFloat16:
      return detail::launch_rotate_quantize<__half>(a, block, stream);
    case DType::kFloat32:
      return detail::launch_rotate_quantize<float>(a, block, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
