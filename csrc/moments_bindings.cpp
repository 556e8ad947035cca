// The CUDA implementations of the operators `moments` and `rounding_moments`; see bindings.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "binding_helpers.h"
#include "moments.h"
#include "quantize_binding_helpers.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> moments(const Tensor& input) {
  const int device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto dtype = halo_train::kernel_dtype(input.scalar_type());
  STD_TORCH_CHECK(input.dim() == 2 && dtype && *dtype != halo_train::DType::kFloat64,
                  "halo_train::moments: x must be a matrix of bfloat16, float16 or float32");
  const Tensor x = input.size(1) <= 1 || input.stride(1) == 1 ? input : torch::stable::contiguous(input);
  const int64_t rows = x.size(0), cols = x.size(1);
  const int32_t wide = aoti_torch_dtype_float64();
  Tensor of_rows = halo_train::empty({3, rows}, x, wide);
  Tensor of_columns = halo_train::empty({2, cols}, x, wide);
  if (x.numel() == 0) {
    torch::stable::fill_(of_rows, 0.0);
    torch::stable::fill_(of_columns, 0.0);
    return {of_rows, of_columns};
  }
  const Tensor scratch = halo_train::empty({halo_train::moments_scratch(rows, cols, device)}, x, wide);
  halo_train::MomentsArgs args{};
  args.x = x.data_ptr();
  args.dtype = *dtype;
  args.rows = rows;
  args.cols = cols;
  args.row_stride = x.stride(0);
  args.of_rows = static_cast<double*>(of_rows.data_ptr());
  args.of_columns = static_cast<double*>(of_columns.data_ptr());
  args.scratch = static_cast<double*>(scratch.data_ptr());
  args.device = device;
  halo_train::check_launch("moments", halo_train::moments(args, halo_train::current_stream(device)), device);
  return {of_rows, of_columns};
}

// Matrices whose neighbouring columns are adjacent.
Tensor with_dense_columns(const Tensor& x) {
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor, Tensor> rounding_moments(const Tensor& input, const Tensor& rounded,
                                                    const Tensor& scale, double largest, int64_t counted) {
  const int device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(input.dim() == 3 && rounded.dim() == 3,
                  "halo_train::rounding_moments: x and data must be [B, R, Q]");
  const Tensor x = with_dense_columns(input), data = with_dense_columns(rounded);
  const int64_t batch = x.size(0), rows = x.size(1), cols = x.size(2);
  const int32_t wide = aoti_torch_dtype_float64();
  Tensor of_rows = halo_train::empty({batch, halo_train::kRoundingSums, rows}, x, wide);
  Tensor of_columns = halo_train::empty({batch, 2, cols}, x, wide);
  Tensor exponents = halo_train::empty({batch, halo_train::kExponents}, x, aoti_torch_dtype_int32());
  torch::stable::fill_(exponents, 0.0);
  if (x.numel() == 0) {
    torch::stable::fill_(of_rows, 0.0);
    torch::stable::fill_(of_columns, 0.0);
    return {of_rows, of_columns, exponents};
  }
  const Tensor scales = halo_train::factors_of(scale, batch * rows, x);
  const Tensor scratch =
      halo_train::empty({halo_train::rounding_moments_scratch(batch, rows, cols)}, x, wide);
  halo_train::RoundingMomentsArgs args{};
  args.x = x.data_ptr();
  args.dtype = halo_train::input_type(x);
  args.x_batch_stride = x.stride(0);
  args.x_row_stride = x.stride(1);
  args.data = data.data_ptr();
  args.qtype = halo_train::quantised_type(data.scalar_type()).type;
  args.data_batch_stride = data.stride(0);
  args.data_row_stride = data.stride(1);
  args.scale = static_cast<const float*>(scales.data_ptr());
  args.largest = static_cast<float>(largest);
  args.counted = counted;
  args.exponents = static_cast<int32_t*>(exponents.data_ptr());
  args.batch = batch;
  args.rows = rows;
  args.cols = cols;
  args.of_rows = static_cast<double*>(of_rows.data_ptr());
  args.of_columns = static_cast<double*>(of_columns.data_ptr());
  args.scratch = static_cast<double*>(scratch.data_ptr());
  halo_train::check_launch("rounding_moments",
                           halo_train::rounding_moments(args, halo_train::current_stream(device)), device);
  return {of_rows, of_columns, exponents};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("rounding_moments", TORCH_BOX(&rounding_moments));
}
