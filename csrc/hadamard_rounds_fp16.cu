#include "hadamard_rounds_launch.cuh"

template cudaError_t halo_train::detail::launch_hadamard_rounds<__half>(const HadamardRoundsArgs&,
                                                                        cudaStream_t);
