// The CUDA implementations of the quantising operators that halo_train/ops.py defines; see bindings.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "binding_helpers.h"
#include "hadamard.h"
#include "quantize.h"

namespace {

using halo_train::check_launch;
using halo_train::current_stream;
using halo_train::QType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

struct Quantised {
  QType type;
  int32_t dtype_code;
};

Quantised quantised_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn:
      return {QType::kE4M3, aoti_torch_dtype_float8_e4m3fn()};
    case ScalarType::Float8_e5m2:
      return {QType::kE5M2, aoti_torch_dtype_float8_e5m2()};
    case ScalarType::Char:
      return {QType::kInt8, aoti_torch_dtype_int8()};
    default:
      break;
  }
  STD_TORCH_CHECK(false, "halo_train: dtype must be float8_e4m3fn, float8_e5m2 or int8");
}

halo_train::DType input_type(const Tensor& x) {
  const auto dtype = halo_train::kernel_dtype(x.scalar_type());
  STD_TORCH_CHECK(dtype && *dtype != halo_train::DType::kFloat64,
                  "halo_train: x must be bfloat16, float16 or float32 to be quantised on a GPU");
  return *dtype;
}

// A matrix whose neighbouring columns are adjacent; its rows may be apart.
Tensor with_dense_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "halo_train: x must be a matrix");
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// n float32 values on the device of x.
Tensor factors_of(const Tensor& v, int64_t n, const Tensor& x) {
  STD_TORCH_CHECK(v.numel() == n && v.is_cuda() && v.get_device_index() == x.get_device_index(),
                  "halo_train: scales must have one value for each row or column, on the device of x");
  return halo_train::dense(v, ScalarType::Float);
}

Tensor empty_floats(const std::vector<int64_t>& sizes, const Tensor& like) {
  return halo_train::empty(sizes, like, aoti_torch_dtype_float32());
}

Tensor empty_words(int64_t count, const Tensor& like) {
  return halo_train::empty({count}, like, aoti_torch_dtype_int32());
}

// x diag(col_scale) rotated along its rows, in float32, so that the rounding that follows is the only one.
Tensor rotated(const char* op, const Tensor& x, int64_t block, const float* col_scale) {
  const int device = x.get_device_index();
  Tensor y = empty_floats({x.size(0), x.size(1)}, x);
  if (x.numel() == 0) return y;
  check_launch(op,
               halo_train::widen(x.data_ptr(), input_type(x), x.size(0), x.size(1), x.stride(0), col_scale,
                                 static_cast<float*>(y.data_ptr()), device, current_stream(device)),
               device);
  halo_train::HadamardArgs args{};
  args.x = y.data_ptr();
  args.y = y.data_ptr();
  args.dtype = halo_train::DType::kFloat32;
  args.total = y.numel();
  args.axis = y.size(1);
  args.row_stride = y.size(1);
  args.block = static_cast<int>(block);
  args.scale = 1.0 / std::sqrt(static_cast<double>(block));
  args.device = device;
  check_launch(op, halo_train::hadamard(args, current_stream(device)), device);
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
  const bool fused = block > 1 && halo_train::can_rotate_quantize(args, static_cast<int>(block));
  std::optional<Tensor> widened;
  if (block > 1 && !fused) {
    widened = rotated(op, x, block, args.col_scale);
    args.x = widened->data_ptr();
    args.dtype = halo_train::DType::kFloat32;
    args.row_stride = args.cols;
    args.col_scale = nullptr;
  }
  const auto launch = [&] {
    check_launch(op,
                 fused ? halo_train::rotate_quantize(args, static_cast<int>(block), stream)
                       : halo_train::quantize_rows(args, stream),
                 args.device);
  };
  if (tensor_amax) {
    args.tensor_amax = static_cast<uint32_t*>(tensor_amax->data_ptr());
    check_launch(op, cudaMemsetAsync(args.tensor_amax, 0, sizeof(uint32_t), stream), args.device);
    void* const q = args.q;
    args.q = nullptr;
    launch();
    args.q = q;
  }
  launch();
}

void quantize_transposed_into(const char* op, const Tensor& x, QType qtype,
                              const std::optional<Tensor>& row_scale, const Tensor& col_amax, bool gather,
                              const Tensor& q, const Tensor& scale,
                              const std::optional<Tensor>& sums = std::nullopt) {
  const int device = x.get_device_index();
  halo_train::QuantizeTransposedArgs args{};
  args.x = x.data_ptr();
  args.dtype = input_type(x);
  args.rows = x.size(0);
  args.cols = x.size(1);
  args.row_stride = x.stride(0);
  args.row_scale = row_scale ? static_cast<const float*>(row_scale->data_ptr()) : nullptr;
  args.col_amax = static_cast<uint32_t*>(col_amax.data_ptr());
  args.gather_col_amax = gather;
  args.qtype = qtype;
  args.q = q.data_ptr();
  args.scale = static_cast<float*>(scale.data_ptr());
  args.device = device;
  std::optional<Tensor> scratch;
  if (sums) {
    scratch = empty_floats({halo_train::column_sums_scratch(args.rows, args.cols)}, x);
    args.sums = static_cast<float*>(sums->data_ptr());
    args.partial_sums = static_cast<float*>(scratch->data_ptr());
  }
  check_launch(op, halo_train::quantize_rows_transposed(args, current_stream(device)), device);
}

std::tuple<Tensor, Tensor> quantize(const char* op, const Tensor& input, ScalarType dtype, int64_t block,
                                    const std::optional<Tensor>& col_scale, bool tensorwise) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = with_dense_rows(input);
  const int64_t rows = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(block > 0 && block <= 32768 && (block & (block - 1)) == 0 && cols % block == 0,
                  "halo_train::", op,
                  ": block must be a power of two, at most 32768, that divides the columns");
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

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x, ScalarType dtype, int64_t block,
                                         const std::optional<Tensor>& col_scale) {
  return quantize("quantize_rows", x, dtype, block, col_scale, false);
}

std::tuple<Tensor, Tensor> quantize_tensor(const Tensor& x, ScalarType dtype, int64_t block,
                                           const std::optional<Tensor>& col_scale) {
  return quantize("quantize_tensor", x, dtype, block, col_scale, true);
}

std::tuple<Tensor, Tensor> quantize_rows_transposed(const Tensor& input, ScalarType dtype,
                                                    const std::optional<Tensor>& row_scale) {
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = with_dense_rows(input);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Quantised quantised = quantised_type(dtype);
  Tensor q = halo_train::empty({cols, rows}, x, quantised.dtype_code);
  Tensor scale = empty_floats({cols}, x);
  std::optional<Tensor> factors;
  if (row_scale) factors = factors_of(*row_scale, rows, x);
  if (x.numel() == 0) {
    torch::stable::fill_(scale, 1.0);  // rows of no elements
    return {q, scale};
  }
  quantize_transposed_into("quantize_rows_transposed", x, quantised.type, factors, empty_words(cols, x), true,
                           q, scale);
  return {q, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_grad(const Tensor& input, ScalarType dtype,
                                                                 const std::optional<Tensor>& col_scale,
                                                                 const Tensor& row_scale, bool column_sums) {
  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  const Tensor e = with_dense_rows(input);
  const int64_t rows = e.size(0), cols = e.size(1);
  const Quantised quantised = quantised_type(dtype);
  Tensor a = halo_train::empty({rows, cols}, e, quantised.dtype_code);
  Tensor u = empty_floats({rows}, e);
  Tensor b = halo_train::empty({cols, rows}, e, quantised.dtype_code);
  Tensor v = empty_floats({cols}, e);
  Tensor sums = empty_floats({column_sums ? cols : 0}, e);
  std::optional<Tensor> t;
  if (col_scale) t = factors_of(*col_scale, cols, e);
  const Tensor s = factors_of(row_scale, rows, e);
  if (e.numel() == 0) {
    torch::stable::fill_(u, 1.0);  // rows of no elements
    torch::stable::fill_(v, 1.0);
    torch::stable::fill_(sums, 0.0);
    return {a, u, b, v, sums};
  }
  // In one piece, the part that is written in vectors aligned.
  const int64_t aligned_cols = (cols + 3) / 4 * 4;
  const Tensor amax = empty_words(aligned_cols + halo_train::quantize_rows_scratch(cols, device), e);
  halo_train::QuantizeRowsArgs args = rows_args(e, quantised.type, t, a, u);
  args.row_scale = static_cast<const float*>(s.data_ptr());
  args.col_amax = static_cast<uint32_t*>(amax.data_ptr());
  args.partial_amax = args.col_amax + aligned_cols;
  check_launch("quantize_grad", halo_train::quantize_rows(args, current_stream(device)), device);
  quantize_transposed_into("quantize_grad", e, quantised.type, s, amax, false, b, v,
                           column_sums ? std::optional(sums) : std::nullopt);
  return {a, u, b, v, sums};
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

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("quantize_rows_transposed", TORCH_BOX(&quantize_rows_transposed));
  m.impl("quantize_grad", TORCH_BOX(&quantize_grad));
  m.impl("quantize_tensor", TORCH_BOX(&quantize_tensor));
  m.impl("transpose_bytes", TORCH_BOX(&transpose_bytes));
  m.impl("equalizer_factors", TORCH_BOX(&equalizer_factors));
}
