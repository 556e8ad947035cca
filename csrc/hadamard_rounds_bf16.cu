#include "hadamard_rounds_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard_rounds<__nv_bfloat16>(const HadamardRoundsArgs&,
                                                                               cudaStream_t);
