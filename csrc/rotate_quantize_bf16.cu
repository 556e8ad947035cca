#include "rotate_quantize_launch.cuh"

template cudaError_t halo_train::detail::launch_rotate_quantize<__nv_bfloat16>(const QuantizeRowsArgs&, int,
                                                                               cudaStream_t);
