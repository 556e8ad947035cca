// The CUDA implementation of the operator `moments` that halo_train/ops.py defines; see bindings.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "binding_helpers.h"
#include "moments.h"

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) { m.impl("moments", TORCH_BOX(&moments)); }
