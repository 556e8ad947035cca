// Launches of scaled_matmul_kernel.cuh.

#include <algorithm>

#include "occupancy.cuh"
#include "scaled_matmul.h"
#include "scaled_matmul_kernel.cuh"

namespace halo_train {

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Of the driver, which the library is not linked with.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Boxes of so many rows of 128 bytes of a row-major matrix.
bool describe(CUtensorMap& map, CUtensorMapDataType type, int size, const void* data, int64_t rows,
              int64_t columns, int64_t stride, int box_rows) {
  const cuuint64_t shape[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encoder()(&map, type, 2, const_cast<void*>(data), shape, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int64_t tiles_of(int64_t m, int64_t n, int tile_n) {
  constexpr int kRows = detail::kClusterBlocks * detail::kBlockRows;
  return (m + kRows - 1) / kRows * ((n + tile_n - 1) / tile_n);
}

template <QType kType, int kTileN, typename Out, int kScaleSteps = 0>
cudaError_t launch(const ScaledProduct& p, CUtensorMapDataType type, cudaStream_t stream) {
  using namespace detail;
  constexpr auto kKernel = scaled_matmul_kernel<kType, kTileN, Out, kScaleSteps>;
  constexpr size_t kShared = MatmulLayout<kTileN>::kShared;
  CUtensorMap a, b, c;
  if (encoder() == nullptr) return cudaErrorNotSupported;
  if (!describe(a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.a, p.m, p.k, p.a_stride, kBlockRows) ||
      !describe(b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.n, p.k, p.b_stride, kTileN / kClusterBlocks) ||
      !describe(c, type, sizeof(Out), p.c, p.m, p.n, p.n * sizeof(Out), kGroupRows)) {
    return cudaErrorInvalidValue;
  }
  int blocks;
  const cudaError_t error = resident_blocks<kKernel>(p.device, 0, kMatmulThreads, kShared, blocks);
  if (error != cudaSuccess) return error;
  const int64_t clusters = std::min<int64_t>(tiles_of(p.m, p.n, kTileN), blocks / kClusterBlocks);
  const MatmulScales scales{p.scale_a, p.scale_b, p.rows_a, p.tiles_b ? kOfTiles : p.rows_b};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kClusterBlocks));
  config.blockDim = dim3(kMatmulThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, a, b, c, scales, static_cast<Out*>(p.c), static_cast<int>(p.m),
                            static_cast<int>(p.n), static_cast<int>((p.k + kStageBytes - 1) / kStageBytes));
}

template <QType kType, typename Out>
cudaError_t launch(const ScaledProduct& p, CUtensorMapDataType type, cudaStream_t stream) {
  if (p.tiles_b && !p.blocks_a) return cudaErrorInvalidValue;
  if constexpr (kType == QType::kInt8) {  // half as wide where wide tiles would leave multiprocessors idle
    if (p.blocks_a) return cudaErrorInvalidValue;
    if (!fills_gpu(p.m, p.n, p.device)) return launch<kType, 128, Out>(p, type, stream);
  } else if (p.blocks_a) {
    return launch<kType, kScaleBlock, Out, kScaleBlock / detail::kStageBytes>(p, type, stream);
  }
  return launch<kType, 256, Out>(p, type, stream);
}

template <QType kType>
cudaError_t launch(const ScaledProduct& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch<kType, __nv_bfloat16>(p, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, stream);
    case DType::kFloat16:
      return launch<kType, __half>(p, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, stream);
    case DType::kFloat32:
      return launch<kType, float>(p, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool fills_gpu(int64_t m, int64_t n, int device) {
  return tiles_of(m, n, 256) * detail::kClusterBlocks >= detail::multiprocessors(device);
}

cudaError_t scaled_matmul(const ScaledProduct& p, cudaStream_t stream) {
  switch (p.type) {
    case QType::kInt8:
      return launch<QType::kInt8>(p, stream);
    case QType::kE4M3:
      return launch<QType::kE4M3>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace halo_train
