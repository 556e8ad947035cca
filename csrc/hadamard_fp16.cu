#include "hadamard_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard<__half>(const HadamardArgs&, cudaStream_t);
