#include "hadamard_matrix_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard_matrix<__half>(const HadamardArgs&, cudaStream_t);
