// Norms whose rows are rotated and rounded at once; see rotate_quantize_kernel.cuh.

#include "rotate_quantize_launch.cuh"

namespace halo_train {

// Other types take the way of norm_rows(): training in 8 bits is training in bfloat16.
cudaError_t norm_quantize(const NormArgs& a, const RowsOutput& out, int block, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const T* x = static_cast<const T*>(a.x);
  if (a.dtype != DType::kBFloat16 || !detail::row_aligned(x, a.row_stride) ||
      !detail::aligned16(a.weight.data) || !detail::aligned16(a.bias.data) ||
      !detail::aligned16(a.col_scale)) {
    return cudaErrorNotSupported;
  }
  const RmsNormRows<T, false> rms{x, a.row_stride, a.weight, a.bias, a.col_scale, a.eps, a.mean, a.rstd};
  if (a.center) return detail::rotate_rows(LayerNormRows<T>{rms}, out, block, nullptr, stream);
  // Without a rotation col_scale holds any factors.
  const bool exact = (a.weight.data == nullptr || a.weight.dtype == DType::kBFloat16) &&
                     (a.col_scale == nullptr || block > 1);
  return exact ? detail::rotate_rows(RmsNormRows<T, true>{x, a.row_stride, a.weight, a.bias, a.col_scale,
                                                          a.eps, a.mean, a.rstd},
                                     out, block, nullptr, stream)
               : detail::rotate_rows(rms, out, block, nullptr, stream);
}

}  // namespace halo_train
