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

#include "binding_helpers.h"
#include "hadamard.h"

namespace {

using halo_train::aligned;
using halo_train::check_launch;
using halo_train::empty;
using halo_train::kernel_dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// The kernels read rows of any stride and write dense ones; other layouts are copied first.
struct Layout {
  explicit Layout(const Tensor& x)
      : vector(16 / static_cast<int64_t>(x.element_size())), stride(row_stride(x)) {
    const int64_t axis = x.sizes()[x.dim() - 1];
    const bool simple = stride >= 0 && aligned(x.data_ptr());
    dense = simple && (stride == axis || x.numel() == axis);
    rows = simple && stride % vector == 0 && axis % vector == 0 && x.scalar_type() != ScalarType::Double;
  }
  int64_t vector;  // elements in 16 bytes
  int64_t stride;  // elements between rows
  bool dense;
  bool rows;
};

halo_train::DType check_hadamard(const Tensor& x, int64_t block, const std::optional<Tensor>& signs) {
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype.has_value(),
                  "halo_train::hadamard: x must be bfloat16, float16, float32 or float64 on a GPU; "
                  "convert it first, e.g. x.float()");
  STD_TORCH_CHECK(x.dim() > 0, "halo_train::hadamard: x must have at least one dimension");
  const int64_t axis = x.sizes()[x.dim() - 1];
  STD_TORCH_CHECK(
      block > 0 && block <= 32768 && (block & (block - 1)) == 0 && axis % block == 0,
      "halo_train::hadamard: block must be a power of two, at most 32768, that divides the last axis");
  STD_TORCH_CHECK(
      !signs ||
          (signs->numel() == axis && signs->is_cuda() && signs->get_device_index() == x.get_device_index()),
      "halo_train::hadamard: signs must have one value per index of the last axis, on the device of x");
  return *dtype;
}

// y = scale * (x diag(signs)) (I kron H_block); x of a layout that the kernels read, not empty; y dense,
// perhaps x.
void transform(const Tensor& x, const Tensor& y, halo_train::DType dtype, int64_t block, double scale,
               const std::optional<Tensor>& signs) {
  const Layout layout(x);
  const int device = x.get_device_index();
  halo_train::HadamardArgs args{};
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  args.dtype = dtype;
  args.total = x.numel();
  args.axis = x.sizes()[x.dim() - 1];
  args.row_stride = layout.dense ? args.axis : layout.stride;
  args.block = static_cast<int>(block);
  args.scale = scale;
  args.device = device;
  std::optional<Tensor> prepared;
  if (signs) {
    int64_t repeats = 1;
    while (args.axis * repeats % layout.vector != 0) repeats *= 2;
    prepared = prepare_signs(*signs, x, repeats);
    args.signs = prepared->data_ptr();
    // x is dense if repeats > 1: rows that are not whole vectors are read no other way.
    if (repeats > 1) args.axis = args.row_stride = args.axis * repeats;
  }
  check_launch("hadamard", halo_train::hadamard(args, halo_train::current_stream(device)), device);
}

Tensor hadamard(const Tensor& x, int64_t block, double scale, const std::optional<Tensor>& signs) {
  const halo_train::DType dtype = check_hadamard(x, block, signs);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = empty(sizes, x);
  if (x.numel() == 0) return y;
  const Layout layout(x);
  if (layout.dense || layout.rows) {
    transform(x, y, dtype, block, scale, signs);
  } else {
    Tensor copy = empty(sizes, x);
    torch::stable::copy_(copy, x);
    transform(copy, y, dtype, block, scale, signs);
  }
  return y;
}

void hadamard_(Tensor x, int64_t block, double scale, const std::optional<Tensor>& signs) {
  const halo_train::DType dtype = check_hadamard(x, block, signs);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (Layout(x).dense) {
    transform(x, x, dtype, block, scale, signs);
  } else {
    torch::stable::copy_(x, hadamard(x, block, scale, signs));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("hadamard_", TORCH_BOX(&hadamard_));
}
