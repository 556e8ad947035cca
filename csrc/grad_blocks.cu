// Both 8-bit forms of a gradient with scales for blocks; see grad_blocks_kernel.cuh.

#include "column_sums.cuh"
#include "grad_blocks_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

template <typename M>
cudaError_t launch(const QuantizeGradArgs& a, const M& matrix, cudaStream_t stream) {
  GradParams<PlainGrad<M>> p{};
  p.source.x = matrix;
  p.rows = a.rows;
  p.cols = a.cols;
  p.row_scale = a.row_scale;
  p.col_scale[0] = a.col_scale;
  p.forms[0] = a.forms;
  p.partial_sums = a.partial_sums;
  if (a.sums == nullptr) return launch_grad_blocks<PlainGrad<M>, false>(p, stream);
  const cudaError_t error = launch_grad_blocks<PlainGrad<M>, true>(p, stream);
  if (error != cudaSuccess) return error;
  return add_partial_sums({p.partial_sums, a.sums, ceil_div(p.rows, kBlockRows), p.cols}, stream);
}

template <typename T>
cudaError_t launch_any(const QuantizeGradArgs& a, cudaStream_t stream) {
  const Matrix<T> x{static_cast<const T*>(a.x), a.row_stride};
  bool vectors = grad_vectors(x, a.rows, a.cols);
  for (const float* factors : {a.col_scale, a.row_scale}) vectors = vectors && aligned(factors);
  return vectors ? launch(a, x, stream) : launch(a, AnyMatrix{a.x, a.dtype, a.row_stride}, stream);
}

}  // namespace

cudaError_t quantize_grad_blocks(const QuantizeGradArgs& a, cudaStream_t stream) {
  if (a.qtype != QType::kE4M3) return cudaErrorInvalidValue;
  switch (a.dtype) {
    case DType::kBFloat16:
      return launch_any<__nv_bfloat16>(a, stream);
    case DType::kFloat16:
      return launch_any<__half>(a, stream);
    case DType::kFloat32:
      return launch_any<float>(a, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

int64_t block_sums_scratch(int64_t rows, int64_t cols) { return ceil_div(rows, kBlockRows) * cols; }

}  // namespace halo_train
