// The CUDA implementations of the quantising operators that halo_train/ops.py defines; see bindings.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "operators.h"
#include "quantize_binding_helpers.h"

namespace {

using halo_train::check_block;
using halo_train::check_cluster_launch;
using halo_train::check_launch;
using halo_train::current_stream;
using halo_train::empty_floats;
using halo_train::empty_words;
using halo_train::factors_of;
using halo_train::FormPair;
using halo_train::input_type;
using halo_train::QType;
using halo_train::Quantised;
using halo_train::quantised_type;
using halo_train::rotate_floats;
using halo_train::ScalarType;
using halo_train::Tensor;
using halo_train::with_dense_rows;
using torch::stable::accelerator::DeviceGuard;

// x diag(col_scale) rotated along its rows, in float32, so that the rounding that follows is the only one.
Tensor rotated(const char* op, const Tensor& x, int64_t block, const float* col_scale) {
  const int device = x.get_device_index();
  Tensor y = empty_floats({x.size(0), x.size(1)}, x);
  check_launch(op,
               halo_train::widen(x.data_ptr(), input_type(x), x.size(0), x.size(1), x.stride(0), col_scale,
                                 static_cast<float*>(y.data_ptr()), device, current_stream(device)),
               device);
  rotate_floats(op, y, block);
  return y;
}

halo_train::QuantizeRowsArgs rows_args(const Tensor& x, QType qtype, const std::optional<Tensor>& col_scale,
                                       const Tensor& q, const Tensor& scale) {
  halo_train::QuantizeRowsArgs args{};
  args.x = x.data_ptr();
  args.dtype = input_type(x);
  args.rows = x.size(0);
  args.cols = x.size(1);
  args.row_stride = x.stride(0);
  args.col_scale = col_scale ? static_cast<const float*>(col_scale->data_ptr()) : nullptr;
  args.qtype = qtype;
  args.q = q.data_ptr();
  args.scale = static_cast<float*>(scale.data_ptr());
  args.device = x.get_device_index();
  return args;
}

// Rounds x, rotated in blocks: with one scale a row, or, where tensor_amax (one word) is given, one for all.
void quantize_blocks(const char* op, const Tensor& x, halo_train::QuantizeRowsArgs args, int64_t block,
                     const std::optional<Tensor>& tensor_amax) {
  const cudaStream_t stream = current_stream(args.device);
  void* const q = args.q;
  if (tensor_amax) {
    args.tensor_amax = static_cast<uint32_t*>(tensor_amax->data_ptr());
    check_launch(op, cudaMemsetAsync(args.tensor_amax, 0, sizeof(uint32_t), stream), args.device);
    args.q = nullptr;  // the largest magnitude first
  }
  std::optional<Tensor> widened;
  const auto launch = [&] {
    if (block > 1 && !widened) {
      const cudaError_t error = halo_train::rotate_quantize(args, static_cast<int>(block), stream);
      if (error != cudaErrorNotSupported) return check_launch(op, error, args.device);
      widened = rotated(op, x, block, args.col_scale);
      args.x = widened->data_ptr();
      args.dtype = halo_train::DType::kFloat32;
      args.row_stride = args.cols;
      args.col_scale = nullptr;
    }
    check_launch(op, halo_train::quantize_rows(args, stream), args.device);
  };
  launch();
  if (tensor_amax) {
    args.q = q;
    launch();
  }
}

std::tuple<Tensor, Tensor> quantize(const char* op, const Tensor& input, ScalarType dtype, int64_t block,
                                    const std::optional<Tensor>& col_scale, bool tensorwise) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = with_dense_rows(input);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_block(op, block, cols);
  const Quantised quantised = quantised_type(dtype);
  Tensor q = halo_train::empty({rows, cols}, x, quantised.dtype_code);
  Tensor scale = tensorwise ? empty_floats({}, x) : empty_floats({rows}, x);
  std::optional<Tensor> factors, amax;
  if (col_scale) factors = factors_of(*col_scale, cols, x);
  if (x.numel() == 0) {
    torch::stable::fill_(scale, 1.0);  // rows of no elements
    return {q, scale};
  }
  if (tensorwise) amax = empty_words(1, x);
  quantize_blocks(op, x, rows_args(x, quantised.type, factors, q, scale), block, amax);
  return {q, scale};
}

std::tuple<Tensor, Tensor> quantize_tensor(const Tensor& x, ScalarType dtype, int64_t block,
                                           const std::optional<Tensor>& col_scale) {
  return quantize("quantize_tensor", x, dtype, block, col_scale, true);
}

// What the kernels of gradients want, and the tensors that it points into.
struct GradCall {
  GradCall(const Tensor& x, QType qtype, const std::optional<Tensor>& col_scale,
           const std::optional<Tensor>& row_scale, const halo_train::GradForms& forms) {
    args.x = x.data_ptr();
    args.dtype = input_type(x);
    args.rows = x.size(0);
    args.cols = x.size(1);
    args.row_stride = x.stride(0);
    if (col_scale) t = factors_of(*col_scale, args.cols, x);
    if (row_scale) s = factors_of(*row_scale, args.rows, x);
    args.col_scale = t ? static_cast<const float*>(t->data_ptr()) : nullptr;
    args.row_scale = s ? static_cast<const float*>(s->data_ptr()) : nullptr;
    args.qtype = qtype;
    args.forms = forms;
  }
  void add_sums(const Tensor& sums, int64_t scratch) {
    partial = empty_floats({scratch}, sums);
    args.sums = static_cast<float*>(sums.data_ptr());
    args.partial_sums = static_cast<float*>(partial->data_ptr());
  }

  halo_train::QuantizeGradArgs args{};
  std::optional<Tensor> t, s, partial;
};

// Both forms of x, or its columns alone where forms.rows is nullptr, and its column sums where `sums` is
// given.
void quantize_forms(const char* op, const Tensor& x, QType qtype, const std::optional<Tensor>& col_scale,
                    const std::optional<Tensor>& row_scale, const halo_train::GradForms& forms,
                    const std::optional<Tensor>& sums = std::nullopt) {
  const int device = x.get_device_index();
  GradCall call(x, qtype, col_scale, row_scale, forms);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Tensor amax = empty_words(rows + cols, x);
  call.args.amax = static_cast<uint32_t*>(amax.data_ptr());
  if (sums) call.add_sums(*sums, halo_train::column_sums_scratch(rows, cols));
  check_launch(op, halo_train::quantize_grad(call.args, current_stream(device)), device);
}

std::tuple<Tensor, Tensor> equalizer_factors(const Tensor& input) {
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  STD_TORCH_CHECK(input.dim() == 1 && input.scalar_type() == ScalarType::Char,
                  "halo_train::equalizer_factors: exponent must be an int8 vector");
  const Tensor exponent = halo_train::dense(input);
  const int64_t n = exponent.size(0);
  Tensor d = empty_floats({n}, exponent), inverse = empty_floats({n}, exponent);
  if (n == 0) return {d, inverse};
  check_launch("equalizer_factors",
               halo_train::equalizer_factors(
                   static_cast<const int8_t*>(exponent.data_ptr()), static_cast<float*>(d.data_ptr()),
                   static_cast<float*>(inverse.data_ptr()), n, current_stream(device)),
               device);
  return {d, inverse};
}

}  // namespace

namespace halo_train::operators {

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, ScalarType dtype, int64_t block,
                                         const std::optional<Tensor>& col_scale) {
  return quantize("quantize_rows", x, dtype, block, col_scale, false);
}

std::tuple<Tensor, Tensor> quantize_rows_transposed(const Tensor& input, ScalarType dtype,
                                                    const std::optional<Tensor>& row_scale) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = with_dense_rows(input);
  const Quantised quantised = quantised_type(dtype);
  const FormPair columns(x.size(1), x.size(0), x, quantised);
  if (x.numel() > 0) {
    quantize_forms("quantize_rows_transposed", x, quantised.type, std::nullopt, row_scale,
                   {nullptr, nullptr, columns.bytes(), columns.floats()});
  }
  return {columns.data, columns.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad(const Tensor& input, ScalarType dtype,
                                                                 const std::optional<Tensor>& col_scale,
                                                                 const Tensor& row_scale, bool column_sums) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor e = with_dense_rows(input);
  const int64_t rows = e.size(0), cols = e.size(1);
  const Quantised quantised = quantised_type(dtype);
  const FormPair a(rows, cols, e, quantised), b(cols, rows, e, quantised);
  Tensor sums = empty_floats({column_sums ? cols : 0}, e);
  if (e.numel() > 0) {
    quantize_forms("quantize_grad", e, quantised.type, col_scale, row_scale,
                   {a.bytes(), a.floats(), b.bytes(), b.floats()},
                   column_sums ? std::optional(sums) : std::nullopt);
  } else {
    torch::stable::fill_(sums, 0.0);
  }
  return {a.data, a.scale, b.data, b.scale, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad_blocks(
    const Tensor& input, ScalarType dtype, const std::optional<Tensor>& col_scale, const Tensor& row_scale,
    bool column_sums) {
  const char* const op = "quantize_grad_blocks";
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  const Tensor e = with_dense_rows(input);
  const int64_t rows = e.size(0), cols = e.size(1);
  const Quantised quantised = quantised_type(dtype);
  const FormPair a = FormPair::of_blocks(rows, cols, e, quantised),
                 b = FormPair::of_blocks(cols, rows, e, quantised);
  Tensor sums = empty_floats({column_sums ? cols : 0}, e);
  if (e.numel() > 0) {
    GradCall call(e, quantised.type, col_scale, row_scale, {a.bytes(), a.floats(), b.bytes(), b.floats()});
    if (column_sums) call.add_sums(sums, halo_train::block_sums_scratch(rows, cols));
    check_cluster_launch(op, halo_train::quantize_grad_blocks(call.args, current_stream(device)), device);
  } else {
    torch::stable::fill_(sums, 0.0);
  }
  return {a.data, a.scale, b.data, b.scale, sums};
}

std::tuple<Tensor, Tensor> quantize_tiles(const Tensor& input, ScalarType dtype,
                                          const std::optional<Tensor>& divisor,
                                          const std::optional<Tensor>& row_scale,
                                          const std::optional<Tensor>& col_scale) {
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  const Tensor x = with_dense_rows(input);
  const Quantised quantised = quantised_type(dtype);
  const FormPair columns = FormPair::of_tiles(x.size(1), x.size(0), x, quantised);
  if (x.numel() > 0) {
    GradCall call(x, quantised.type, col_scale, row_scale,
                  {nullptr, nullptr, columns.bytes(), columns.floats()});
    const std::optional<Tensor> by =
        divisor ? std::optional(factors_of(*divisor, x.size(0), x)) : std::nullopt;
    call.args.row_divisor = by ? static_cast<const float*>(by->data_ptr()) : nullptr;
    check_cluster_launch("quantize_tiles", halo_train::quantize_tiles(call.args, current_stream(device)),
                         device);
  }
  return {columns.data, columns.scale};
}

Tensor transpose_bytes(const Tensor& input) {
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  STD_TORCH_CHECK(input.dim() == 2 && input.element_size() == 1,
                  "halo_train::transpose_bytes: x must be a matrix of one-byte elements");
  const Tensor x = halo_train::dense(input);
  Tensor y = halo_train::empty({x.size(1), x.size(0)}, x);
  if (x.numel() == 0) return y;
  check_launch(
      "transpose_bytes",
      halo_train::transpose_bytes(x.data_ptr(), y.data_ptr(), x.size(0), x.size(1), current_stream(device)),
      device);
  return y;
}

}  // namespace halo_train::operators

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&halo_train::operators::quantize_rows));
  m.impl("quantize_rows_transposed", TORCH_BOX(&halo_train::operators::quantize_rows_transposed));
  m.impl("quantize_grad", TORCH_BOX(&halo_train::operators::quantize_grad));
  m.impl("quantize_grad_blocks", TORCH_BOX(&halo_train::operators::quantize_grad_blocks));
  m.impl("quantize_tiles", TORCH_BOX(&halo_train::operators::quantize_tiles));
  m.impl("quantize_tensor", TORCH_BOX(&quantize_tensor));
  m.impl("transpose_bytes", TORCH_BOX(&halo_train::operators::transpose_bytes));
  m.impl("equalizer_factors", TORCH_BOX(&equalizer_factors));
}
