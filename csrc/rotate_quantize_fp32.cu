#include "rotate_quantize_launch.cuh"

template cudaError_t halo_train::detail::launch_rotate_quantize<float>(const QuantizeRowsArgs&, int,
                                                                       cudaStream_t);
