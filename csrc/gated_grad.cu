// Both 8-bit forms of both gradients of a gated activation; see quantize_grad_kernel.cuh.

#include "quantize_grad_kernel.cuh"

namespace halo_train {
namespace {

using namespace detail;

template <typename T, QType kType, typename Act>
cudaError_t launch(const GatedGradArgs& a, cudaStream_t stream) {
  using Source = GatedGrad<T, Act>;
  GradParams<Source> p{};
  p.source.dh = {static_cast<const T*>(a.dh), a.dh_stride};
  p.source.gate = {static_cast<const T*>(a.gate), a.gate_stride};
  p.source.up = {static_cast<const T*>(a.up), a.up_stride};
  p.source.activation = Act::of(a.activation);
  p.rows = a.rows;
  p.cols = a.cols;
  p.row_scale = a.row_scale;
  p.row_amax = a.amax;
  p.col_amax = a.amax + 2 * a.rows;
  bool vectors =
      vectorised(p.source.dh, a.cols) && vectorised(p.source.gate, a.cols) && vectorised(p.source.up, a.cols);
  for (int o = 0; o < 2; ++o) {
    p.col_scale[o] = a.col_scale[o];
    p.forms[o] = a.forms[o];
    vectors = vectors && (a.col_scale[o] == nullptr || aligned(a.col_scale[o]));
  }
  return with_grad_width(vectors, a.rows, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const cudaError_t error = gather_grad_amax<Source, (kWidth > 1), true>(p, stream);
    return error != cudaSuccess ? error : round_grad<Source, kType, kWidth, true, false, 1>(p, stream);
  });
}

}  // namespace

cudaError_t gated_grad_quantize(const GatedGradArgs& a, cudaStream_t stream) {
  return dispatch(a.dtype, a.qtype, [&](auto input, auto qtype) {
    using T = typename decltype(input)::type;
    constexpr QType kType = decltype(qtype)::value;
    return a.activation == Activation::kGelu ? launch<T, kType, ErfActivation>(a, stream)
                                             : launch<T, kType, SigmoidActivation>(a, stream);
  });
}

}  // namespace halo_train
