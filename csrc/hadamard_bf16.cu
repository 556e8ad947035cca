#include "hadamard_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard<__nv_bfloat16>(const HadamardArgs&, cudaStream_t);
