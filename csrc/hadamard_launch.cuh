// The configuration table of the Hadamard kernels and the launch. One translation unit for each type includes this.

#pragma once

#include <algorithm>
#include <atomic>

#include "hadamard.h"
#include "hadamard_kernel.cuh"

namespace halo_train::detail {

constexpr int kMaxDevices = 64;

inline cudaError_t multiprocessors(int device, int& count) {
    static std::atomic<int> known[kMaxDevices];
    const bool cached = device < kMaxDevices;
    count = cached ? known[device].load(std::memory_order_relaxed) : 0;
    if (count > 0) return cudaSuccess;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && cached) known[device].store(count, std::memory_order_relaxed);
    return error;
}

// More than 48 KB of shared memory has to be asked for, once for each kernel and device.
template <auto kKernel>
cudaError_t allow_shared(size_t bytes, int device) {
    static std::atomic<bool> done[kMaxDevices];
    if (bytes <= 48 * 1024 || (device < kMaxDevices && done[device].load(std::memory_order_relaxed))) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess && device < kMaxDevices) done[device].store(true, std::memory_order_relaxed);
    return error;
}

template <typename L, int kUnits, int kThreads, int kMinBlocks>
cudaError_t launch_warps(const HadamardParams<typename L::T>& p, int, cudaStream_t stream) {
    constexpr int64_t kElements = static_cast<int64_t>(kThreads / 32 * kUnits) << L::kLogTile;
    const int64_t grid = (p.total + kElements - 1) / kElements;
    hadamard_warp<L, kUnits, kThreads, kMinBlocks><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

template <typename L, bool kPrefetch, int kMinBlocks>
cudaError_t launch_blocks(const HadamardParams<typename L::T>& p, int device, cudaStream_t stream) {
    constexpr auto kKernel = hadamard_block<L, kPrefetch, kMinBlocks>;
    int count;
    cudaError_t error = multiprocessors(device, count);
    if (error == cudaSuccess) error = allow_shared<kKernel>(L::kSharedBytes, device);
    if (error != cudaSuccess) return error;
    const int64_t grid = std::min(p.total >> L::kLogN, static_cast<int64_t>(count) * kMinBlocks);
    kKernel<<<static_cast<unsigned>(grid), 32 * L::kWarps, L::kSharedBytes, stream>>>(p);
    return cudaGetLastError();
}

// The table: values in a thread, bits shuffled before the exchange, tiles in flight, threads or prefetch, and thread
// blocks on a multiprocessor for each size.
template <typename T>
cudaError_t launch_sized(const HadamardParams<T>& p, int device, cudaStream_t stream) {
    constexpr bool kHalf = sizeof(T) == 2;
    constexpr int kMin = kHalf ? 3 : 2;  // log2 of the values in one 16-byte load
    constexpr int kSmall = HadamardLayout<T, 1, kMin, 2>::kLogSmall;
    if (p.log_block <= kSmall) return launch_warps<HadamardLayout<T, kSmall, kMin, 2>, 4, 256, 4>(p, device, stream);
    switch (p.log_block) {
        case 5: return launch_warps<HadamardLayout<T, 5, kMin, 2>, 4, 256, 4>(p, device, stream);
        case 6: return launch_warps<HadamardLayout<T, 6, 3, 2>, kHalf ? 4 : 2, 256, 4>(p, device, stream);
        case 7: return launch_warps<HadamardLayout<T, 7, 4, 2>, 2, 256, 4>(p, device, stream);
        case 8: return launch_warps<HadamardLayout<T, 8, 5, 2>, 1, 256, 4>(p, device, stream);
        case 9: return launch_warps<HadamardLayout<T, 9, kHalf ? 6 : 5, 2>, 1, 128, 4>(p, device, stream);
        case 10: return launch_warps<HadamardLayout<T, 10, kHalf ? 6 : 5, 2>, 1, 128, 4>(p, device, stream);
        case 11: return launch_warps<HadamardLayout<T, 11, 6, 2>, 1, 128, 4>(p, device, stream);
        case 12: return launch_blocks<HadamardLayout<T, 12, kHalf ? 6 : 5, kHalf ? 0 : 2>, kHalf, 8>(p, device, stream);
        case 13: return launch_blocks<HadamardLayout<T, 13, kHalf ? 6 : 5, kHalf ? 0 : 2>, kHalf, 4>(p, device, stream);
        case 14: return launch_blocks<HadamardLayout<T, 14, kHalf ? 6 : 5, kHalf ? 0 : 2>, kHalf, 2>(p, device, stream);
        case 15: return launch_blocks<HadamardLayout<T, 15, 6, kHalf ? 1 : 2>, kHalf, 1>(p, device, stream);
        default: return cudaErrorInvalidValue;
    }
}

template <typename T>
cudaError_t launch_hadamard(const HadamardArgs& args, cudaStream_t stream) {
    constexpr int kVector = 16 / sizeof(T);
    HadamardParams<T> p;
    p.x = static_cast<const T*>(args.x);
    p.y = static_cast<T*>(args.y);
    p.signs = static_cast<const T*>(args.signs);
    p.total = args.total;
    p.row_stride = args.row_stride;
    p.axis = static_cast<uint32_t>(args.axis / kVector);
    p.split = args.signs != nullptr || args.row_stride != args.axis;
    p.scale = static_cast<float>(args.scale);
    p.log_block = 0;
    while (1 << p.log_block < args.block) ++p.log_block;
    return launch_sized(p, args.device, stream);
}

}  // namespace halo_train::detail
