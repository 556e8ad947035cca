// Dispatch on the type, and float64 (for gradient checks: right, not fast).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "hadamard.h"

namespace halo_train {
namespace {

// One butterfly stage in global memory on pairs `half` apart; half = 0 only scales. With signs it is the
// first stage, with factors the last.
__global__ void hadamard_stage(const double* x, double* y, const double* signs, const double* out_scale,
                               int64_t total, int64_t axis, int64_t half, double scale) {
  const auto load = [&](int64_t i) { return signs != nullptr && signbit(signs[i % axis]) ? -x[i] : x[i]; };
  const auto factor = [&](int64_t i) { return out_scale != nullptr ? scale * out_scale[i % axis] : scale; };
  const int64_t pairs = half > 0 ? total / 2 : total;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < pairs;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    if (half == 0) {
      y[i] = load(i) * factor(i);
      continue;
    }
    const int64_t first = i / half * 2 * half + i % half;
    const double a = load(first);
    const double b = load(first + half);
    y[first] = (a + b) * factor(first);
    y[first + half] = (a - b) * factor(first + half);
  }
}

cudaError_t hadamard_float64(const HadamardArgs& args, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>((args.total + 255) / 256, 1 << 16));
  const double* x = static_cast<const double*>(args.x);
  double* y = static_cast<double*>(args.y);
  const double* signs = static_cast<const double*>(args.signs);
  const double* out_scale = static_cast<const double*>(args.out_scale);
  int64_t half = args.block > 1 ? 1 : 0;
  do {
    const bool last = half == 0 || 2 * half >= args.block;
    hadamard_stage<<<grid, 256, 0, stream>>>(x, y, signs, last ? out_scale : nullptr, args.total, args.axis,
                                             half, last ? args.scale : 1.0);
    x = y;
    signs = nullptr;
    half *= 2;
  } while (half > 0 && half < args.block);
  return cudaGetLastError();
}

}  // namespace

cudaError_t hadamard(const HadamardArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return args.matrix != nullptr ? detail::launch_hadamard_matrix<__nv_bfloat16>(args, stream)
                                    : detail::launch_hadamard<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return args.matrix != nullptr ? detail::launch_hadamard_matrix<__half>(args, stream)
                                    : detail::launch_hadamard<__half>(args, stream);
    case DType::kFloat32:
      return detail::launch_hadamard<float>(args, stream);
    case DType::kFloat64:
      return hadamard_float64(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t hadamard_rounds(const HadamardRoundsArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return detail::launch_hadamard_rounds<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return detail::launch_hadamard_rounds<__half>(args, stream);
    case DType::kFloat32:
      return detail::launch_hadamard_rounds<float>(args, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
