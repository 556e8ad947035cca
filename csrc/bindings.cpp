// The CUDA implementations of the operators that halo_train/ops.py defines, through PyTorch's stable ABI: one
// library serves every PyTorch from 2.10 on and every Python. Arguments are checked in ops.py; what is
// repeated here is what would corrupt memory.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "hadamard.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_launch(const char* op, cudaError_t error, int device) {
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

Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Elements between rows if all axes but the last collapse into one, else -1.
int64_t row_stride(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const size_t last = sizes.size() - 1;
  if (sizes[last] > 1 && strides[last] != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (size_t i = last; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (stride < 0) {
      stride = strides[i];
    } else if (strides[i] != expected) {
      return -1;
    }
    expected = strides[i] * sizes[i];
  }
  return stride < 0 ? sizes[last] : stride;
}

std::optional<halo_train::DType> kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return halo_train::DType::kBFloat16;
    case ScalarType::Half:
      return halo_train::DType::kFloat16;
    case ScalarType::Float:
      return halo_train::DType::kFloat32;
    case ScalarType::Double:
      return halo_train::DType::kFloat64;
    default:
      return std::nullopt;
  }
}

// The signs as the kernel reads them: x's dtype, dense, aligned, and long enough that a period is whole
// vectors.
Tensor prepare_signs(const Tensor& signs, const Tensor& x, int64_t repeats) {
  Tensor cast = torch::stable::contiguous(torch::stable::to(signs, x.scalar_type()));
  if (repeats == 1 && aligned(cast.data_ptr())) return cast;
  const int64_t n = cast.numel();
  Tensor tiled = empty({repeats, n}, x);
  for (int64_t i = 0; i < repeats; ++i) {
    Tensor part = torch::stable::select(tiled, 0, i);
    torch::stable::copy_(part, cast);
  }
  return tiled;
}

Tensor hadamard(const Tensor& x, int64_t block, double scale, const std::optional<Tensor>& signs) {
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype.has_value(),
                  "halo_train::hadamard: x must be bfloat16, float16, float32 or float64 on a GPU; "
                  "convert it first, e.g. x.float()");
  STD_TORCH_CHECK(x.dim() > 0, "halo_train::hadamard: x must have at least one dimension");
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t axis = sizes.back();
  STD_TORCH_CHECK(
      block > 0 && block <= 32768 && (block & (block - 1)) == 0 && axis % block == 0,
      "halo_train::hadamard: block must be a power of two, at most 32768, that divides the last axis");
  STD_TORCH_CHECK(
      !signs ||
          (signs->numel() == axis && signs->is_cuda() && signs->get_device_index() == x.get_device_index()),
      "halo_train::hadamard: signs must have one value per index of the last axis, on the device of x");

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = empty(sizes, x);
  if (x.numel() == 0) return y;

  const int64_t vector = 16 / static_cast<int64_t>(x.element_size());
  const int64_t stride = row_stride(x);
  const bool dense = stride == axis || x.numel() == axis;
  const bool direct = *dtype != halo_train::DType::kFloat64 && aligned(x.data_ptr()) &&
                      (dense || (stride >= 0 && stride % vector == 0 && axis % vector == 0));
  // Any other layout is copied to y and transformed there.
  if (!direct) torch::stable::copy_(y, x);

  halo_train::HadamardArgs args{};
  args.x = direct ? x.data_ptr() : y.data_ptr();
  args.y = y.data_ptr();
  args.dtype = *dtype;
  args.total = x.numel();
  args.axis = axis;
  args.row_stride = direct && !dense ? stride : axis;
  args.block = static_cast<int>(block);
  args.scale = scale;
  args.device = device;
  std::optional<Tensor> prepared;
  if (signs) {
    int64_t repeats = 1;
    while (axis * repeats % vector != 0) repeats *= 2;
    prepared = prepare_signs(*signs, x, repeats);
    args.signs = prepared->data_ptr();
    // Dense here if repeats > 1: other layouts of rows that are not whole vectors were copied.
    if (repeats > 1) args.axis = args.row_stride = axis * repeats;
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check_launch("hadamard", halo_train::hadamard(args, static_cast<cudaStream_t>(stream)), device);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) { m.impl("hadamard", TORCH_BOX(&hadamard)); }
