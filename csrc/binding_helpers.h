// What the operators' bindings share: checks of a launch, empty tensors, types.

#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "hadamard.h"

namespace halo_train {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_launch(const char* op, cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  std::string message = std::string("halo_train::") + op + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string capability = std::to_string(major) + std::to_string(minor);
    message += ": this GPU is sm_" + capability +
               ", the kernels were built for " HALO_TRAIN_ARCHS
               "; build them for it with HALO_TRAIN_CUDA_ARCHS=" +
               capability + " pip install .";
  } else if (error == cudaErrorLaunchOutOfResources) {
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    message += ": the block needs more shared memory than the " + std::to_string(bytes / 1024) +
               " KB that this GPU gives a thread block; use a smaller block";
  }
  STD_TORCH_CHECK(false, message);
}

// A dense tensor on the device of `like`; of its dtype, or of the dtype with the given shim code.
inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like,
                    std::optional<int32_t> dtype_code = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t dtype;
  if (dtype_code) {
    dtype = *dtype_code;
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// x dense, and in the dtype; itself if it is that already, because asking PyTorch costs the host as much as a
// launch.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return dense(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline std::optional<DType> kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

// PyTorch's current stream. Also chooses the device in this library's own copy of the CUDA runtime: the
// guards of PyTorch set it in theirs.
inline cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(cudaSetDevice(device) == cudaSuccess, "halo_train: the GPU of the tensor cannot be used");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace halo_train
