// Both 8-bit forms of a gradient, or of a weight its columns alone; see quantize_grad_kernel.cuh.

#include "column_sums.cuh"
#include "quantize_grad_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

constexpr int kTiles = 4;

template <QType kType, typename Source>
cudaError_t launch(const GradParams<Source>& p, float* sums, cudaStream_t stream) {
  if (p.forms[0].rows == nullptr) {
    const cudaError_t error = gather_grad_amax<Source, false>(p, stream);
    return error != cudaSuccess ? error : round_grad<Source, kType, false, false, kTiles>(p, stream);
  }
  cudaError_t error = gather_grad_amax<Source, true>(p, stream);
  if (error != cudaSuccess) return error;
  if (sums == nullptr) return round_grad<Source, kType, true, false, kTiles>(p, stream);
  error = round_grad<Source, kType, true, true, kTiles>(p, stream);
  if (error != cudaSuccess) return error;
  return add_partial_sums({p.partial_sums, sums, ceil_div(p.rows, kGradRows * kTiles), p.cols}, stream);
}

}  // namespace

cudaError_t quantize_grad(const QuantizeGradArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    const auto run = [&](auto matrix) {
      GradParams<PlainGrad<decltype(matrix)>> p{};
      p.source.x = matrix;
      p.rows = a.rows;
      p.cols = a.cols;
      p.row_scale = a.row_scale;
      p.col_scale[0] = a.col_scale;
      p.row_amax = a.amax;
      p.col_amax = a.amax + (a.forms.rows != nullptr ? a.rows : 0);
      p.forms[0] = a.forms;
      p.partial_sums = a.partial_sums;
      return launch<kType>(p, a.sums, stream);
    };
    const Matrix<T> x{static_cast<const T*>(a.x), a.row_stride};
    return grad_vectors(x, a.rows, a.cols) && (a.col_scale == nullptr || aligned(a.col_scale))
               ? run(x)
               : run(AnyMatrix{a.x, a.dtype, a.row_stride});
  });
}

int64_t column_sums_scratch(int64_t rows, int64_t cols) { return ceil_div(rows, kGradRows * kTiles) * cols; }

}  // namespace halo_train
