// The CUDA implementations of the operators that fuse a norm or an activation with the rounding of its
// result; see halo_train/fused_reference.py and bindings.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <string>
#include <tuple>

#include "quantize_binding_helpers.h"

namespace {

using halo_train::Activation;
using halo_train::check_block;
using halo_train::check_cluster_launch;
using halo_train::check_launch;
using halo_train::current_stream;
using halo_train::DType;
using halo_train::empty_floats;
using halo_train::empty_words;
using halo_train::factors_of;
using halo_train::FormPair;
using halo_train::GatedArgs;
using halo_train::GatedGradArgs;
using halo_train::input_type;
using halo_train::kernel_dtype;
using halo_train::NormArgs;
using halo_train::Quantised;
using halo_train::quantised_type;
using halo_train::QuantizeRowsArgs;
using halo_train::rotate_floats;
using halo_train::RowsOutput;
using halo_train::ScalarType;
using halo_train::Tensor;
using halo_train::Vector;
using halo_train::with_dense_rows;
using torch::stable::accelerator::DeviceGuard;

// Rotates and rounds float32 rows that passes of their own have made.
void quantize_floats(const char* op, const Tensor& y, const RowsOutput& out, int64_t block) {
  if (block > 1) rotate_floats(op, y, block);
  QuantizeRowsArgs args{};
  args.x = y.data_ptr();
  args.dtype = DType::kFloat32;
  args.rows = out.rows;
  args.cols = out.cols;
  args.row_stride = out.cols;
  args.qtype = out.qtype;
  args.q = out.q;
  args.scale = out.scale;
  args.device = out.device;
  check_launch(op, halo_train::quantize_rows(args, current_stream(out.device)), out.device);
}

// The fused kernel, or where it does not take its input `rows`, which writes float32, and what remains.
template <typename Args>
void quantize_produced(const char* op, const Args& args, const RowsOutput& out, int64_t block,
                       const Tensor& like,
                       cudaError_t (*fused)(const Args&, const RowsOutput&, int, cudaStream_t),
                       cudaError_t (*rows)(const Args&, int64_t, int64_t, float*, int, cudaStream_t)) {
  const cudaStream_t stream = current_stream(out.device);
  const cudaError_t error = fused(args, out, static_cast<int>(block), stream);
  if (error != cudaErrorNotSupported) return check_launch(op, error, out.device);
  const Tensor y = empty_floats({out.rows, out.cols}, like);
  check_launch(op, rows(args, out.rows, out.cols, static_cast<float*>(y.data_ptr()), out.device, stream),
               out.device);
  quantize_floats(op, y, out, block);
}

const float* data_or_null(const std::optional<Tensor>& factors) {
  return factors ? static_cast<const float*>(factors->data_ptr()) : nullptr;
}

std::optional<Tensor> optional_factors(const std::optional<Tensor>& v, int64_t n, const Tensor& x) {
  return v ? std::optional(factors_of(*v, n, x)) : std::nullopt;
}

// A vector in a type that the kernels read, made dense in `kept`.
Vector column_vector(const std::optional<Tensor>& v, int64_t n, const Tensor& x,
                     std::optional<Tensor>& kept) {
  if (!v) return {nullptr, DType::kFloat32};
  const auto dtype = kernel_dtype(v->scalar_type());
  if (!dtype || *dtype == DType::kFloat64) {
    kept = factors_of(*v, n, x);
    return {kept->data_ptr(), DType::kFloat32};
  }
  STD_TORCH_CHECK(v->numel() == n && v->is_cuda() && v->get_device_index() == x.get_device_index(),
                  "halo_train: weight and bias must have one value for each column, on the device of x");
  kept = halo_train::dense(*v);
  return {kept->data_ptr(), *dtype};
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "halo_train: activation must be silu, gelu or gelu_tanh");
  return Activation::kGeluTanh;
}

void check_like(const char* op, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.is_cuda() &&
                      x.get_device_index() == like.get_device_index() &&
                      x.scalar_type() == like.scalar_type(),
                  "halo_train::", op, ": the matrices must have one shape, dtype and device");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize(const Tensor& input,
                                                         const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias, double eps,
                                                         bool center, ScalarType dtype, int64_t block,
                                                         const std::optional<Tensor>& col_scale) {
  const char* const op = "norm_quantize";
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  const Tensor x = with_dense_rows(input);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_block(op, block, cols);
  const Quantised quantised = quantised_type(dtype);
  const FormPair result(rows, cols, x, quantised);
  Tensor mean = center ? empty_floats({rows, 1}, x) : empty_floats({0}, x), rstd = empty_floats({rows, 1}, x);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(rstd, std::numeric_limits<double>::quiet_NaN());
    return {result.data, result.scale, mean, rstd};
  }
  std::optional<Tensor> kept_weight, kept_bias;
  const std::optional<Tensor> factors = optional_factors(col_scale, cols, x);
  NormArgs args{};
  args.x = x.data_ptr();
  args.dtype = input_type(x);
  args.row_stride = x.stride(0);
  args.weight = column_vector(weight, cols, x, kept_weight);
  args.bias = column_vector(bias, cols, x, kept_bias);
  args.col_scale = data_or_null(factors);
  args.eps = static_cast<float>(eps);
  args.center = center;
  args.mean = center ? static_cast<float*>(mean.data_ptr()) : nullptr;
  args.rstd = static_cast<float*>(rstd.data_ptr());
  const RowsOutput out{rows, cols, quantised.type, result.bytes(), result.floats(), device};
  quantize_produced(op, args, out, block, x, &halo_train::norm_quantize, &halo_train::norm_rows);
  return {result.data, result.scale, mean, rstd};
}

std::tuple<Tensor, Tensor> gated_quantize(const Tensor& gate_input, const Tensor& up_input,
                                          std::string activation, ScalarType dtype, int64_t block,
                                          const std::optional<Tensor>& col_scale) {
  const char* const op = "gated_quantize";
  const int device = gate_input.get_device_index();
  const DeviceGuard guard(device);
  check_like(op, up_input, gate_input);
  const Tensor gate = with_dense_rows(gate_input), up = with_dense_rows(up_input);
  const int64_t rows = gate.size(0), cols = gate.size(1);
  check_block(op, block, cols);
  const Quantised quantised = quantised_type(dtype);
  const FormPair result(rows, cols, gate, quantised);
  if (gate.numel() == 0) return {result.data, result.scale};
  const std::optional<Tensor> factors = optional_factors(col_scale, cols, gate);
  GatedArgs args{};
  args.gate = gate.data_ptr();
  args.up = up.data_ptr();
  args.dtype = input_type(gate);
  args.gate_stride = gate.stride(0);
  args.up_stride = up.stride(0);
  args.activation = activation_of(activation);
  args.col_scale = data_or_null(factors);
  const RowsOutput out{rows, cols, quantised.type, result.bytes(), result.floats(), device};
  quantize_produced(op, args, out, block, gate, &halo_train::gated_quantize, &halo_train::gated_rows);
  return {result.data, result.scale};
}

using GatedGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Both forms of both gradients, made by make_form(rows, cols, like, quantised) and filled by `kernel`.
template <typename MakeForm>
GatedGrads gated_grads(const char* op, const Tensor& dh_input, const Tensor& gate_input,
                       const Tensor& up_input, const std::string& activation, ScalarType dtype,
                       const Tensor& row_scale, const std::optional<Tensor>& gate_col_scale,
                       const std::optional<Tensor>& up_col_scale, const MakeForm& make_form,
                       cudaError_t (*kernel)(const GatedGradArgs&, cudaStream_t), bool gathers) {
  const int device = dh_input.get_device_index();
  const DeviceGuard guard(device);
  check_like(op, gate_input, dh_input);
  check_like(op, up_input, dh_input);
  const Tensor dh = with_dense_rows(dh_input), gate = with_dense_rows(gate_input),
               up = with_dense_rows(up_input);
  const int64_t rows = dh.size(0), cols = dh.size(1);
  const Quantised quantised = quantised_type(dtype);
  const FormPair gate_rows = make_form(rows, cols, dh, quantised),
                 up_rows = make_form(rows, cols, dh, quantised);
  const FormPair gate_columns = make_form(cols, rows, dh, quantised),
                 up_columns = make_form(cols, rows, dh, quantised);
  if (dh.numel() > 0) {
    const Tensor s = factors_of(row_scale, rows, dh), amax = empty_words(gathers ? 2 * (rows + cols) : 0, dh);
    const std::optional<Tensor> t[2] = {optional_factors(gate_col_scale, cols, dh),
                                        optional_factors(up_col_scale, cols, dh)};
    GatedGradArgs args{};
    args.dh = dh.data_ptr();
    args.gate = gate.data_ptr();
    args.up = up.data_ptr();
    args.dtype = input_type(dh);
    args.rows = rows;
    args.cols = cols;
    args.dh_stride = dh.stride(0);
    args.gate_stride = gate.stride(0);
    args.up_stride = up.stride(0);
    args.activation = activation_of(activation);
    args.row_scale = static_cast<const float*>(s.data_ptr());
    args.qtype = quantised.type;
    args.amax = static_cast<uint32_t*>(amax.data_ptr());
    const FormPair* const forms[2][2] = {{&gate_rows, &gate_columns}, {&up_rows, &up_columns}};
    for (int o = 0; o < 2; ++o) {
      args.col_scale[o] = data_or_null(t[o]);
      args.forms[o] = {forms[o][0]->bytes(), forms[o][0]->floats(), forms[o][1]->bytes(),
                       forms[o][1]->floats()};
    }
    check_cluster_launch(op, kernel(args, current_stream(device)), device);
  }
  return {gate_rows.data,    gate_rows.scale,    up_rows.data,    up_rows.scale,
          gate_columns.data, gate_columns.scale, up_columns.data, up_columns.scale};
}

GatedGrads gated_grad_quantize(const Tensor& dh, const Tensor& gate, const Tensor& up, std::string activation,
                               ScalarType dtype, const Tensor& row_scale,
                               const std::optional<Tensor>& gate_col_scale,
                               const std::optional<Tensor>& up_col_scale) {
  const auto form = [](int64_t rows, int64_t cols, const Tensor& like, const Quantised& quantised) {
    return FormPair(rows, cols, like, quantised);
  };
  return gated_grads("gated_grad_quantize", dh, gate, up, activation, dtype, row_scale, gate_col_scale,
                     up_col_scale, form, &halo_train::gated_grad_quantize, true);
}

GatedGrads gated_grad_blocks(const Tensor& dh, const Tensor& gate, const Tensor& up, std::string activation,
                             ScalarType dtype, const Tensor& row_scale,
                             const std::optional<Tensor>& gate_col_scale,
                             const std::optional<Tensor>& up_col_scale) {
  return gated_grads("gated_grad_blocks", dh, gate, up, activation, dtype, row_scale, gate_col_scale,
                     up_col_scale, &FormPair::of_blocks, &halo_train::gated_grad_blocks, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("norm_quantize", TORCH_BOX(&norm_quantize));
  m.impl("gated_quantize", TORCH_BOX(&gated_quantize));
  m.impl("gated_grad_quantize", TORCH_BOX(&gated_grad_quantize));
  m.impl("gated_grad_blocks", TORCH_BOX(&gated_grad_blocks));
}
