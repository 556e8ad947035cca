// Gated activations whose rows are rotated and rounded at once; see rotate_quantize_kernel.cuh.

#include "rotate_quantize_launch.cuh"

namespace halo_train {
namespace {

using T = __nv_bfloat16;

template <typename Act>
cudaError_t launch(const GatedArgs& a, const RowsOutput& out, int block, cudaStream_t stream) {
  const GatedRows<T, Act> source{
      static_cast<const T*>(a.gate), static_cast<const T*>(a.up), a.gate_stride, a.up_stride, a.col_scale,
      Act::of(a.activation)};
  if (!detail::row_aligned(source.gate, a.gate_stride) || !detail::row_aligned(source.up, a.up_stride)) {
    return cudaErrorNotSupported;
  }
  return detail::rotate_rows(source, out, block, nullptr, stream);
}

}  // namespace

// Other types take the way of gated_rows(): training in 8 bits is training in bfloat16.
cudaError_t gated_quantize(const GatedArgs& a, const RowsOutput& out, int block, cudaStream_t stream) {
  if (a.dtype != DType::kBFloat16) return cudaErrorNotSupported;
  return a.activation == Activation::kGelu ? launch<ErfActivation>(a, out, block, stream)
                                           : launch<SigmoidActivation>(a, out, block, stream);
}

}  // namespace halo_train
