// Rotating and rounding in one pass: which kernels serve which input (rotate_quantize_launch.cuh, one
// translation unit for each type).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quantize.h"

namespace halo_train {

namespace detail {

template <typename T>
cudaError_t launch_rotate_quantize(const QuantizeRowsArgs& args, int block, cudaStream_t stream);

}  // namespace detail

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
