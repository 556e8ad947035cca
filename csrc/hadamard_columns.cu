// Launch of the transforms of an axis that is not the last.

#include "hadamard_columns.cuh"
#include "hadamard_launch.cuh"

namespace halo_train {
namespace {

template <typename In, typename Out, int kLogBlock>
cudaError_t launch(ColumnsParams<In, Out> p, int64_t rows, int device, cudaStream_t stream) {
  constexpr int kLanes = kLogBlock > 8 ? 16 : 32;  // 64 KB of shared memory, 128 for the largest
  using L = ColumnsLayout<kLogBlock, kLanes>;
  constexpr auto kKernel = hadamard_columns<In, Out, kLogBlock, kLanes>;
  const cudaError_t error = detail::allow_shared<kKernel, L::kSharedBytes>(device);
  if (error != cudaSuccess) return error;
  p.slabs = (p.inner + 2 * kLanes - 1) / (2 * kLanes);
  const int64_t tasks = (rows >> kLogBlock) * p.slabs;
  const int64_t grid = (tasks + L::kGroups - 1) / L::kGroups;
  kKernel<<<static_cast<unsigned>(grid), L::kThreads, L::kSharedBytes, stream>>>(p, tasks);
  return cudaGetLastError();
}

// kFrom to kTo: the blocks (as powers of two) that exist for these types.
template <int kFrom, int kTo, typename In, typename Out>
cudaError_t launch_sized(const ColumnsParams<In, Out>& p, int log_block, int64_t rows, int device,
                         cudaStream_t stream) {
  if constexpr (kFrom > kTo) {
    return cudaErrorInvalidValue;
  } else {
    if (log_block == kFrom) return launch<In, Out, kFrom>(p, rows, device, stream);
    return launch_sized<kFrom + 1, kTo>(p, log_block, rows, device, stream);
  }
}

constexpr int kLogOnePass = 10;

template <typename T>
cudaError_t transform(const HadamardColumnsArgs& args, cudaStream_t stream) {
  int log_block = 0;
  while (1 << log_block < args.block) ++log_block;
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const float scale = static_cast<float>(args.scale);
  const int64_t rows = args.outer * args.axis;
  if (log_block <= kLogOnePass) {
    const ColumnsParams<T, T> p{x, y, args.signs, args.axis, args.inner, 0, scale};
    return launch_sized<1, kLogOnePass>(p, log_block, rows, args.device, stream);
  }
  // Two passes with float32 in between, so that there is one rounding. The upper bits are the transform of an
  // axis whose rows are the lower bits' blocks.
  const int lower = (log_block + 1) / 2, upper = log_block - lower;
  float* middle = static_cast<float*>(args.middle);
  const ColumnsParams<T, float> first{x, middle, args.signs, args.axis, args.inner, 0, 1.0f};
  const cudaError_t error = launch_sized<5, 8>(first, lower, rows, args.device, stream);
  if (error != cudaSuccess) return error;
  const ColumnsParams<float, T> second{middle, y, nullptr, args.axis >> lower, args.inner << lower, 0, scale};
  return launch_sized<5, 8>(second, upper, rows >> lower, args.device, stream);
}

}  // namespace

bool hadamard_columns_needs_middle(int block) { return block > 1 << kLogOnePass; }

cudaError_t hadamard_columns(const HadamardColumnsArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return transform<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return transform<__half>(args, stream);
    case DType::kFloat32:
      return transform<float>(args, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
