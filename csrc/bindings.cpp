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
#include "operators.h"

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

// A vector over the axis as the kernel reads it: of the given type, dense, aligned, and long enough that a
// period is whole vectors.
Tensor prepare(const Tensor& vector, ScalarType dtype, int64_t repeats) {
  Tensor cast = halo_train::dense(vector, dtype);
  if (repeats == 1 && aligned(cast.data_ptr())) return cast;
  const int64_t n = cast.numel();
  Tensor tiled = empty({repeats, n}, cast);
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

// What the operators take beside x.
struct Options {
  int64_t block;
  double scale;
  const std::optional<Tensor>& signs;
  const std::optional<Tensor>& out_scale;
  const std::optional<Tensor>& matrix;
};

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

halo_train::DType check_hadamard(const Tensor& x, const Options& o) {
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype.has_value(),
                  "halo_train::hadamard: x must be bfloat16, float16, float32 or float64 on a GPU; "
                  "convert it first, e.g. x.float()");
  STD_TORCH_CHECK(x.dim() > 0, "halo_train::hadamard: x must have at least one dimension");
  const int64_t axis = x.sizes()[x.dim() - 1];
  if (!o.matrix) {
    STD_TORCH_CHECK(
        is_power_of_two(o.block) && o.block <= 32768 && axis % o.block == 0,
        "halo_train::hadamard: block must be a power of two, at most 32768, that divides the last axis");
  } else {
    const Tensor& m = *o.matrix;
    STD_TORCH_CHECK(
        m.dim() == 2 && m.size(0) == m.size(1) && m.scalar_type() == x.scalar_type() && m.is_contiguous() &&
            m.is_cuda() && m.get_device_index() == x.get_device_index(),
        "halo_train::hadamard: matrix must be square, contiguous, of the dtype of x and on its device");
    const int64_t order = m.size(0), power = order > 0 ? o.block / order : 0;
    STD_TORCH_CHECK(order % 4 == 0 && order <= 64 && order * power == o.block && is_power_of_two(power) &&
                        power >= 64 && power <= (order > 16 && order <= 32 ? 1024 : 512) &&
                        axis % o.block == 0 && x.element_size() == 2,
                    "halo_train::hadamard: with a matrix, x must be bfloat16 or float16 and block must "
                    "divide the last axis and be 64 "
                    "to 512 times the order, a multiple of 4 up to 64, or 1024 times an order from 20 to 32");
  }
  for (const std::optional<Tensor>* v : {&o.signs, &o.out_scale}) {
    STD_TORCH_CHECK(
        !*v || ((*v)->numel() == axis && (*v)->is_cuda() && (*v)->get_device_index() == x.get_device_index()),
        "halo_train::hadamard: signs and out_scale must have one value per index of the last axis, "
        "on the device of x");
  }
  return *dtype;
}

// x of a layout that the kernels read, not empty; y dense, perhaps x.
void transform(const Tensor& x, const Tensor& y, halo_train::DType dtype, const Options& o) {
  const Layout layout(x);
  const int device = x.get_device_index();
  halo_train::HadamardArgs args{};
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  args.dtype = dtype;
  args.total = x.numel();
  args.axis = x.sizes()[x.dim() - 1];
  args.row_stride = layout.dense ? args.axis : layout.stride;
  args.block = static_cast<int>(o.block);
  args.order = 1;
  args.scale = o.scale;
  args.device = device;
  if (o.matrix) {
    args.matrix = o.matrix->data_ptr();
    args.order = static_cast<int>(o.matrix->size(0));
  }
  std::optional<Tensor> signs, out_scale;
  if (o.signs || o.out_scale) {
    int64_t repeats = 1;
    while (args.axis * repeats % layout.vector != 0) repeats *= 2;
    if (o.signs) {
      signs = prepare(*o.signs, x.scalar_type(), repeats);
      args.signs = signs->data_ptr();
    }
    if (o.out_scale) {
      const bool wide = x.scalar_type() == ScalarType::Double;
      out_scale = prepare(*o.out_scale, wide ? ScalarType::Double : ScalarType::Float, repeats);
      args.out_scale = out_scale->data_ptr();
    }
    // x is dense if repeats > 1: rows that are not whole vectors are read no other way.
    if (repeats > 1) args.axis = args.row_stride = args.axis * repeats;
  }
  check_launch("hadamard", halo_train::hadamard(args, halo_train::current_stream(device)), device);
}

// Runs transform(x, y) into a new tensor, from a copy of x where the kernels do not read its layout.
template <typename Transform>
Tensor out_of_place(const Tensor& x, const Transform& run) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = empty(sizes, x);
  if (x.numel() == 0) return y;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Layout layout(x);
  if (layout.dense || layout.rows) {
    run(x, y);
  } else {
    Tensor copy = empty(sizes, x);
    torch::stable::copy_(copy, x);
    run(copy, y);
  }
  return y;
}

template <typename Transform>
void in_place(Tensor& x, const Transform& run) {
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (Layout(x).dense) {
    run(x, x);
  } else {
    torch::stable::copy_(x, out_of_place(x, run));
  }
}

Tensor hadamard(const Tensor& x, int64_t block, double scale, const std::optional<Tensor>& signs,
                const std::optional<Tensor>& out_scale, const std::optional<Tensor>& matrix) {
  const Options options{block, scale, signs, out_scale, matrix};
  const halo_train::DType dtype = check_hadamard(x, options);
  return out_of_place(x, [&](const Tensor& from, const Tensor& to) { transform(from, to, dtype, options); });
}

// What the operators for two rounds take beside x.
struct Rounds {
  int64_t block;
  double scale;
  const std::optional<Tensor>& first;
  const Tensor& middle;
  const std::optional<Tensor>& last;
};

halo_train::DType check_rounds(const Tensor& x, const Rounds& o) {
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype && *dtype != halo_train::DType::kFloat64,
                  "halo_train::hadamard_rounds: x must be bfloat16, float16 or float32 on a GPU");
  STD_TORCH_CHECK(x.dim() > 0, "halo_train::hadamard_rounds: x must have at least one dimension");
  const int64_t axis = x.sizes()[x.dim() - 1];
  STD_TORCH_CHECK(is_power_of_two(o.block) && o.block >= 64 && o.block <= 32768 && axis % o.block == 0,
                  "halo_train::hadamard_rounds: block must be a power of two from 64 to 32768 that divides "
                  "the last axis");
  const Tensor* const given[] = {o.first ? &*o.first : nullptr, &o.middle, o.last ? &*o.last : nullptr};
  for (const Tensor* v : given) {
    STD_TORCH_CHECK(
        v == nullptr ||
            (v->scalar_type() == ScalarType::Byte && v->is_contiguous() && v->numel() == axis / 8 &&
             v->is_cuda() && v->get_device_index() == x.get_device_index()),
        "halo_train::hadamard_rounds: first, middle and last must be contiguous uint8 of one bit per index "
        "of the last axis, on the device of x");
  }
  return *dtype;
}

// As transform(), for two rounds.
void transform_rounds(const Tensor& x, const Tensor& y, halo_train::DType dtype, const Rounds& o) {
  const Layout layout(x);
  const int device = x.get_device_index();
  // Bits are read eight bytes at a time.
  std::vector<Tensor> kept;
  const auto bits = [&](const Tensor& v) {
    kept.push_back(aligned(v.data_ptr()) ? v : torch::stable::clone(v));
    return static_cast<const uint8_t*>(kept.back().data_ptr());
  };
  halo_train::HadamardRoundsArgs args{};
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  args.first = o.first ? bits(*o.first) : nullptr;
  args.middle = bits(o.middle);
  args.last = o.last ? bits(*o.last) : nullptr;
  args.dtype = dtype;
  args.total = x.numel();
  args.axis = x.sizes()[x.dim() - 1];
  args.row_stride = layout.dense ? args.axis : layout.stride;
  args.block = static_cast<int>(o.block);
  args.scale = o.scale;
  args.device = device;
  check_launch("hadamard_rounds", halo_train::hadamard_rounds(args, halo_train::current_stream(device)),
               device);
}

Tensor hadamard_rounds(const Tensor& x, int64_t block, double scale, const std::optional<Tensor>& first,
                       const Tensor& middle, const std::optional<Tensor>& last) {
  const Rounds rounds{block, scale, first, middle, last};
  const halo_train::DType dtype = check_rounds(x, rounds);
  return out_of_place(
      x, [&](const Tensor& from, const Tensor& to) { transform_rounds(from, to, dtype, rounds); });
}

void hadamard_rounds_(Tensor x, int64_t block, double scale, const std::optional<Tensor>& first,
                      const Tensor& middle, const std::optional<Tensor>& last) {
  const Rounds rounds{block, scale, first, middle, last};
  const halo_train::DType dtype = check_rounds(x, rounds);
  in_place(x, [&](const Tensor& from, const Tensor& to) { transform_rounds(from, to, dtype, rounds); });
}

Tensor hadamard_axis(const Tensor& input, int64_t block, double scale, const std::optional<Tensor>& signs) {
  // Pairs of elements are read at once.
  const Tensor x = aligned(input.data_ptr()) ? input : torch::stable::clone(input);
  const auto dtype = kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype && *dtype != halo_train::DType::kFloat64,
                  "halo_train::hadamard_axis: x must be bfloat16, float16 or float32");
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.size(2) % 2 == 0,
                  "halo_train::hadamard_axis: x must be [outer, n, inner], contiguous, inner even");
  STD_TORCH_CHECK(
      is_power_of_two(block) && block > 1 && block <= 32768 && x.size(1) % block == 0,
      "halo_train::hadamard_axis: block must be a power of two from 2 to 32768 that divides the axis");
  STD_TORCH_CHECK(
      !signs || (signs->numel() == x.size(1) && signs->is_cuda() &&
                 signs->get_device_index() == x.get_device_index()),
      "halo_train::hadamard_axis: signs must have one value per index of the axis, on the device of x");
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor y = empty({x.size(0), x.size(1), x.size(2)}, x);
  if (x.numel() == 0) return y;
  halo_train::HadamardColumnsArgs args{};
  std::optional<Tensor> prepared, middle;
  if (signs) {
    prepared = prepare(*signs, ScalarType::Float, 1);
    args.signs = static_cast<const float*>(prepared->data_ptr());
  }
  if (halo_train::hadamard_columns_needs_middle(static_cast<int>(block))) {
    middle = empty({x.numel()}, x, aoti_torch_dtype_float32());
    args.middle = middle->data_ptr();
  }
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  args.dtype = *dtype;
  args.outer = x.size(0);
  args.axis = x.size(1);
  args.inner = x.size(2);
  args.block = static_cast<int>(block);
  args.scale = scale;
  args.device = device;
  check_launch("hadamard_axis", halo_train::hadamard_columns(args, halo_train::current_stream(device)),
               device);
  return y;
}

}  // namespace

namespace halo_train::operators {

void hadamard_(Tensor x, int64_t block, double scale, const std::optional<Tensor>& signs,
               const std::optional<Tensor>& out_scale, const std::optional<Tensor>& matrix) {
  const Options options{block, scale, signs, out_scale, matrix};
  const halo_train::DType dtype = check_hadamard(x, options);
  in_place(x, [&](const Tensor& from, const Tensor& to) { transform(from, to, dtype, options); });
}

}  // namespace halo_train::operators

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("hadamard_", TORCH_BOX(&halo_train::operators::hadamard_));
  m.impl("hadamard_rounds", TORCH_BOX(&hadamard_rounds));
  m.impl("hadamard_rounds_", TORCH_BOX(&hadamard_rounds_));
  m.impl("hadamard_axis", TORCH_BOX(&hadamard_axis));
}
