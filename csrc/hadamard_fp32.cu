#include "hadamard_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard<float>(const HadamardArgs&, cudaStream_t);
