// Both 8-bit forms of both gradients of a gated activation; see quantize_grad_kernel.cuh.

#include "quantize_grad_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

template <QType kType, typename Act, typename M>
cudaError_t launch(const GatedGradArgs& a, const M& dh, const M& gate, const M& up, cudaStream_t stream) {
  using Source = GatedGrad<M, Act>;
  GradParams<Source> p{};
  p.source = {dh, gate, up, Act{}};
  p.rows = a.rows;
  p.cols = a.cols;
  p.row_scale = a.row_scale;
  p.row_amax = a.amax;
  p.col_amax = a.amax + 2 * a.rows;
  for (int o = 0; o < 2; ++o) {
    p.col_scale[o] = a.col_scale[o];
    p.forms[o] = a.forms[o];
  }
  const cudaError_t error = gather_grad_amax<Source, true>(p, stream);
  return error != cudaSuccess ? error : round_grad<Source, kType, true, false, 4>(p, stream);
}

template <QType kType, typename Act>
cudaError_t launch_any(const GatedGradArgs& a, cudaStream_t stream) {
  // Vectors of bfloat16 alone: training in 8 bits is training in bfloat16.
  using T = __nv_bfloat16;
  const Matrix<T> dh{static_cast<const T*>(a.dh), a.dh_stride};
  const Matrix<T> gate{static_cast<const T*>(a.gate), a.gate_stride};
  const Matrix<T> up{static_cast<const T*>(a.up), a.up_stride};
  bool vectors = a.dtype == DType::kBFloat16;
  for (const auto& m : {dh, gate, up}) vectors = vectors && grad_vectors(m, a.rows, a.cols);
  for (const float* t : a.col_scale) vectors = vectors && (t == nullptr || aligned(t));
  return vectors ? launch<kType, Act>(a, dh, gate, up, stream)
                 : launch<kType, Act>(a, AnyMatrix{a.dh, a.dtype, a.dh_stride},
                                      AnyMatrix{a.gate, a.dtype, a.gate_stride},
                                      AnyMatrix{a.up, a.dtype, a.up_stride}, stream);
}

}  // namespace

cudaError_t gated_grad_quantize(const GatedGradArgs& a, cudaStream_t stream) {
  return dispatch_qtype<__nv_bfloat16>(a.qtype, [&](auto, auto qtype) {
    constexpr QType kType = decltype(qtype)::value;
    return with_activation(
        a.activation, [&](auto activation) { return launch_any<kType, decltype(activation)>(a, stream); });
  });
}

}  // namespace halo_train
