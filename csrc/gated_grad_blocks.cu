// Both 8-bit forms of both gradients of a gated activation with scales for blocks; see
// grad_blocks_kernel.cuh.

#include "grad_blocks_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

template <typename Act, typename M>
cudaError_t launch(const GatedGradArgs& a, const M& dh, const M& gate, const M& up, cudaStream_t stream) {
  using Source = GatedGrad<M, Act>;
  GradParams<Source> p{};
  p.source = {dh, gate, up, Act{}};
  p.rows = a.rows;
  p.cols = a.cols;
  p.row_scale = a.row_scale;
  for (int o = 0; o < 2; ++o) {
    p.col_scale[o] = a.col_scale[o];
    p.forms[o] = a.forms[o];
  }
  return launch_grad_blocks<Source, false>(p, stream);
}

template <typename Act>
cudaError_t launch_any(const GatedGradArgs& a, cudaStream_t stream) {
  // Vectors of bfloat16 alone: training in 8 bits is training in bfloat16.
  using T = __nv_bfloat16;
  const Matrix<T> dh{static_cast<const T*>(a.dh), a.dh_stride};
  const Matrix<T> gate{static_cast<const T*>(a.gate), a.gate_stride};
  const Matrix<T> up{static_cast<const T*>(a.up), a.up_stride};
  bool vectors = a.dtype == DType::kBFloat16 && aligned(a.row_scale);
  for (const auto& m : {dh, gate, up}) vectors = vectors && grad_vectors(m, a.rows, a.cols);
  for (const float* t : a.col_scale) vectors = vectors && aligned(t);
  return vectors ? launch<Act>(a, dh, gate, up, stream)
                 : launch<Act>(a, AnyMatrix{a.dh, a.dtype, a.dh_stride},
                               AnyMatrix{a.gate, a.dtype, a.gate_stride},
                               AnyMatrix{a.up, a.dtype, a.up_stride}, stream);
}

}  // namespace

cudaError_t gated_grad_blocks(const GatedGradArgs& a, cudaStream_t stream) {
  if (a.qtype != QType::kE4M3) return cudaErrorInvalidValue;
  return with_activation(a.activation,
                         [&](auto activation) { return launch_any<decltype(activation)>(a, stream); });
}

}  // namespace halo_train
