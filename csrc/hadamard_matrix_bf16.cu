#include "hadamard_matrix_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard_matrix<__nv_bfloat16>(const HadamardArgs&,
                                                                               cudaStream_t);
