// Gated activations whose rows are rotated and rounded at once; see rotate_quantize_kernel.cuh.

#include "rotate_quantize_launch.cuh"

namespace halo_train {
// Other types take the way of gated_rows(): training in 8 bits is training in bfloat16.
cudaError_t gated_quantize(const GatedArgs& a, const RowsOutput& out, int block, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  if (a.dtype != DType::kBFloat16 || !detail::row_aligned(gate, a.gate_stride) ||
      !detail::row_aligned(up, a.up_stride) || !detail::aligned16(a.col_scale)) {
    return cudaErrorNotSupported;
  }
  return with_activation(a.activation, [&](auto activation) {
    const GatedRows<T, decltype(activation)> source{gate,        up,          a.gate_stride,
                                                    a.up_stride, a.col_scale, activation};
    return detail::rotate_rows(source, out, block, nullptr, stream);
  });
}

}  // namespace halo_train
