// The 8-bit matrix products, and what is done to an operand before or to the result after in the same call:
// small layers wait for the host, which needs longer for a call from Python than the GPU for what is called.
// The products themselves are PyTorch's (cuBLASLt for float8), or our own kernel's (takes_kernel).

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#include "operators.h"
#include "quantize_binding_helpers.h"
#include "scaled_matmul.h"

namespace {

using halo_train::ScalarType;
using halo_train::Tensor;
using torch::stable::accelerator::DeviceGuard;
namespace operators = halo_train::operators;

// The same memory as [rows, cols] with the given strides.
Tensor view(const Tensor& x, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

int32_t code_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    default:
      break;
  }
  STD_TORCH_CHECK(false, "halo_train: a product on a GPU is written as bfloat16, float16 or float32");
}

// 10 * major + minor, asked once for each device.
int capability(int device) {
  constexpr int kCachedDevices = 64;
  static std::atomic<int> known[kCachedDevices];
  const bool cached = device < kCachedDevices;
  int found = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (found > 0) return found;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  found = 10 * major + minor;
  if (cached) known[device].store(found, std::memory_order_relaxed);
  return found;
}

void check_float8_gpu(int device) {
  const int found = capability(device);
  STD_TORCH_CHECK(found >= 89, "float8 products need a GPU of compute capability 8.9 or newer; this one has ",
                  found / 10, ".", found % 10, "; use recipe='int8' or recipe='bf16'");
}

Tensor times(const Tensor& x, const Tensor& factor) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mul_Tensor(x.get(), factor.get(), &handle));
  return Tensor(handle);
}

Tensor column(const Tensor& scale) { return view(scale, {scale.numel(), 1}, {1, 1}); }
Tensor row(const Tensor& scale) { return view(scale, {1, scale.numel()}, {scale.numel(), 1}); }

// Whether PyTorch's product applies these scales: of rows and columns to bfloat16 results only.
bool library_scales(const Tensor& scale_a, const Tensor& scale_b, ScalarType out_dtype) {
  const bool rows = scale_a.dim() == 1, columns = scale_b.dim() == 1;
  return rows && columns ? out_dtype == ScalarType::BFloat16 : !rows && !columns;
}

Tensor float8_matmul(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                     ScalarType out_dtype, bool fast_accum) {
  const Tensor b_t = view(b, {b.size(1), b.size(0)}, {b.stride(1), b.stride(0)});
  const auto product = [&](const Tensor& by_row, const Tensor& by_column, int32_t dtype) {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_mm(a.get(), b_t.get(), by_row.get(), by_column.get(),
                                                      nullptr, nullptr, &dtype, fast_accum, &handle));
    return Tensor(handle);
  };
  const bool rows = scale_a.dim() == 1;
  if (library_scales(scale_a, scale_b, out_dtype)) {
    return rows ? product(column(scale_a), row(scale_b), code_of(out_dtype))
                : product(scale_a, scale_b, code_of(out_dtype));
  }
  // Raw sums stay in float32, float16 would overflow.
  Tensor one = halo_train::empty_floats({}, scale_a);
  torch::stable::fill_(one, 1.0);
  const Tensor sums = product(one, one, code_of(ScalarType::Float));
  const Tensor scaled = times(times(sums, rows ? column(scale_a) : scale_a), scale_b);
  return out_dtype == ScalarType::Float ? scaled : torch::stable::to(scaled, out_dtype);
}

// Of Hopper, and only in a build for it: other machine code of the kernel is empty.
bool has_kernel(int device) {
  static const bool built = std::strstr(HALO_TRAIN_ARCHS, "sm_90a") != nullptr;
  return built && capability(device) == 90;
}

// Multiplications of a float8 product that is long enough to run at the power limit of the GPU, where our
// kernel, which moves less, is faster than cuBLASLt, which leaves fewer cycles idle.
constexpr int64_t kLongProduct = int64_t{1} << 39;
// And of one that is so short that a layer waits for its host, for which our kernel is 14 us less work:
// PyTorch asks cuBLASLt for an algorithm in every call. To the GPU they are alike there.
constexpr int64_t kShortProduct = int64_t{1} << 36;

// Whether our kernel computes such products, whatever their size.
bool kernel_fits(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
  const auto dtype = halo_train::kernel_dtype(out_dtype);
  return has_kernel(a.get_device_index()) && dtype && *dtype != halo_train::DType::kFloat64 &&
         b.size(0) % 16 == 0 && a.size(1) % 16 == 0;
}

bool both_e4m3(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Float8_e4m3fn && b.scalar_type() == ScalarType::Float8_e4m3fn;
}

// Which products our kernel computes: of int8 all that it can; of e4m3 with fast sums those that fill the GPU
// and are long or short, with row scales, or have scales that the library does not apply.
bool takes_kernel(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                  ScalarType out_dtype, bool fast_accum) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  if (!kernel_fits(a, b, out_dtype) || k == 0) return false;
  if (a.scalar_type() == ScalarType::Char) return k <= halo_train::kInt8MaxContraction;
  const int64_t length = m * n * k;
  const bool is_ours = scale_a.dim() == 1 && (length >= kLongProduct || length < kShortProduct);
  return both_e4m3(a, b) && fast_accum && (is_ours || !library_scales(scale_a, scale_b, out_dtype)) &&
         halo_train::fills_gpu(m, n, a.get_device_index());
}

// Rows that start at multiples of 16 bytes, as copies by the tensor memory accelerator want them.
Tensor aligned_rows(const Tensor& x) {
  if (x.stride(1) == 1 && x.stride(0) % 16 == 0 && halo_train::aligned(x.data_ptr())) return x;
  return x.is_contiguous() ? torch::stable::clone(x) : torch::stable::contiguous(x);
}

Tensor kernel_matmul(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                     ScalarType out_dtype) {
  const int device = a.get_device_index();
  Tensor c = halo_train::empty({a.size(0), b.size(0)}, a, code_of(out_dtype));
  if (c.numel() == 0) return c;
  if (a.size(1) == 0) {
    torch::stable::fill_(c, 0.0);
    return c;
  }
  const Tensor left = aligned_rows(a), right = aligned_rows(b);
  const Tensor by_row = halo_train::dense(scale_a), by_column = halo_train::dense(scale_b);
  halo_train::ScaledProduct product{};
  product.type = halo_train::quantised_type(a.scalar_type()).type;
  product.a = left.data_ptr();
  product.b = right.data_ptr();
  product.c = c.data_ptr();
  product.a_stride = left.stride(0);
  product.b_stride = right.stride(0);
  product.m = a.size(0);
  product.n = b.size(0);
  product.k = a.size(1);
  product.scale_a = static_cast<const float*>(by_row.data_ptr());
  product.scale_b = static_cast<const float*>(by_column.data_ptr());
  product.rows_a = scale_a.dim() > 0;
  product.blocks_a = scale_a.dim() == 2;
  product.rows_b = scale_b.dim() == 1;
  product.tiles_b = scale_b.dim() == 2;
  product.dtype = *halo_train::kernel_dtype(out_dtype);
  product.device = device;
  halo_train::check_launch("scaled_matmul",
                           halo_train::scaled_matmul(product, halo_train::current_stream(device)), device);
  return c;
}

Tensor scaled_matmul(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                     ScalarType out_dtype, bool fast_accum) {
  const int device = a.get_device_index();
  const DeviceGuard guard(device);
  if (scale_a.dim() == 2) {  // no library applies them
    STD_TORCH_CHECK(
        kernel_fits(a, b, out_dtype) && both_e4m3(a, b) && fast_accum,
        "halo_train: a product with a scale for each block of its contraction needs a GPU of compute "
        "capability 9.0, dimensions of the contraction and of the rows of b that are multiples of 16, "
        "float8_e4m3fn operands and fast_accum=True; use one scale a row");
    return kernel_matmul(a, b, scale_a, scale_b, out_dtype);
  }
  if (takes_kernel(a, b, scale_a, scale_b, out_dtype, fast_accum)) {
    return kernel_matmul(a, b, scale_a, scale_b, out_dtype);
  }
  if (a.scalar_type() != ScalarType::Char) {
    check_float8_gpu(device);
    return float8_matmul(a, b, scale_a, scale_b, out_dtype, fast_accum);
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(a), from(b), from(scale_a), from(scale_b), from(out_dtype)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("halo_train::int8_matmul", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Contracted over the rows of b.
Tensor matmul_rows(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                   ScalarType out_dtype, bool fast_accum) {
  const DeviceGuard guard(a.get_device_index());
  const Tensor transposed = operators::transpose_bytes(b);
  return scaled_matmul(a, transposed, scale_a, scale_b, out_dtype, fast_accum);
}

std::tuple<Tensor, Tensor> matmul_weight_rows(const Tensor& a, const Tensor& scale_a, const Tensor& weight,
                                              int64_t block, const std::optional<Tensor>& col_scale,
                                              ScalarType out_dtype, bool fast_accum) {
  const auto [data, scale] = operators::quantize_rows(weight, a.scalar_type(), block, col_scale);
  return {scaled_matmul(a, data, scale_a, scale, out_dtype, fast_accum), scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> matmul_rounded(
    const Tensor& x, const std::optional<Tensor>& x_col_scale, const Tensor& weight,
    const std::optional<Tensor>& weight_col_scale, ScalarType dtype, int64_t block, ScalarType out_dtype,
    bool fast_accum, bool columns) {
  const auto [data, scale] = operators::quantize_rows(x, dtype, block, x_col_scale);
  // At once: small x is in the L2 cache still.
  const auto [kept, tiles] = columns ? operators::quantize_tiles(x, dtype, scale, {}, {})
                                     : std::tuple(data, halo_train::empty_floats({0}, scale));
  const auto [y, weight_scale] =
      matmul_weight_rows(data, scale, weight, block, weight_col_scale, out_dtype, fast_accum);
  return {y, kept, scale, tiles, weight_scale};
}

Tensor matmul_weight_columns(const Tensor& a, const Tensor& scale_a, const Tensor& weight,
                             const std::optional<Tensor>& row_scale, ScalarType dtype, ScalarType out_dtype,
                             bool fast_accum) {
  const bool tiles = scale_a.dim() == 2;
  STD_TORCH_CHECK(!tiles || !row_scale,
                  "halo_train: matmul_weight_columns takes no row_scale with scales for blocks of a");
  const auto [data, scale] = tiles ? operators::quantize_tiles(weight, dtype, {}, {}, {})
                                   : operators::quantize_rows_transposed(weight, dtype, row_scale);
  return scaled_matmul(a, data, scale_a, scale, out_dtype, fast_accum);
}

Tensor matmul_rotated(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                      bool rows, int64_t block, const std::optional<Tensor>& col_scale, ScalarType out_dtype,
                      bool fast_accum) {
  Tensor y = (rows ? matmul_rows : scaled_matmul)(a, b, scale_a, scale_b, out_dtype, fast_accum);
  if (block == 1 && !col_scale) return y;
  const double norm = 1.0 / std::sqrt(static_cast<double>(block));
  operators::hadamard_(y, block, norm, std::nullopt, col_scale, std::nullopt);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> matmul_gradients(
    const Tensor& e, const std::optional<Tensor>& e_col_scale, const Tensor& weight,
    const std::optional<Tensor>& weight_row_scale, const Tensor& x, const Tensor& x_scale,
    const Tensor& x_col_scale, ScalarType grad_dtype, int64_t block, const std::optional<Tensor>& col_scale,
    ScalarType out_dtype, bool column_sums, bool fast_accum, bool blocks) {
  const auto rounding = blocks ? operators::quantize_grad_blocks : operators::quantize_grad;
  auto [rows, row_scales, columns, column_scales, sums] =
      rounding(e, grad_dtype, e_col_scale, x_scale, column_sums);
  Tensor dx = matmul_weight_columns(rows, row_scales, weight, weight_row_scale, x.scalar_type(), out_dtype,
                                    fast_accum);
  rows = columns;                              // gives its memory back
  const bool by_rows = x_col_scale.dim() < 2;  // else x is given by its columns, with scales for tiles
  Tensor dw = matmul_rotated(columns, x, column_scales, x_col_scale, by_rows, block, col_scale,
                             weight.scalar_type(), fast_accum);
  return {dx, dw, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(halo_train, CUDA, m) {
  m.impl("scaled_matmul", TORCH_BOX(&scaled_matmul));
  m.impl("matmul_rows", TORCH_BOX(&matmul_rows));
  m.impl("matmul_weight_rows", TORCH_BOX(&matmul_weight_rows));
  m.impl("matmul_weight_columns", TORCH_BOX(&matmul_weight_columns));
  m.impl("matmul_rounded", TORCH_BOX(&matmul_rounded));
  m.impl("matmul_gradients", TORCH_BOX(&matmul_gradients));
  m.impl("matmul_rotated", TORCH_BOX(&matmul_rotated));
}
