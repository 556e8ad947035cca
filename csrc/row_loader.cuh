// How the rows of rotate_quantize_kernel.cuh come from memory: a warp fetches its tile of a row while it
// works on an earlier one. Each thread reads, of load j, eight neighbouring elements from column in() + (j
// << kLoadBit) of the tile.

#pragma once

#include "rotate_quantize_tile.cuh"
#include "shared_address.cuh"

namespace halo_train::detail {

constexpr int kMaxRowWarps = 16, kMaxStages = 2;
constexpr int kLeanWarps = 20;  // of a multiprocessor, where a thread gets 96 registers instead of 128

// threadIdx.x, read anew with every call, so that what is made of it need not stay in a register.
__device__ __forceinline__ int read_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Column, within its warp's tile, of the elements of a lane.
template <typename L>
__device__ __forceinline__ int lane_column(int lane) {
  return (lane & 3) << 4 | (lane >> 2 & 1) << 3 | L::in_lanes(lane >> 3);
}

// The next row waits in registers: for one input of 16 bits.
template <typename T, typename L>
class RegisterLoader {
 public:
  static constexpr int kQuads = sizeof(T) / 2;  // 16-byte pieces of eight elements
  static constexpr int kInputs = 1;

  // `columns` of the row are left from the warp's tile on.
  __device__ RegisterLoader(uint4*, uint64_t*, int lane, int columns, int)
      : in_(lane_column<L>(lane)), columns_(columns) {}
  __device__ __forceinline__ void start(int, const T* const (&tile)[1]) {
    // Where warps trade values no register is left for in_.
    const T* const from = tile[0] + (L::kTrade ? lane_column<L>(read_thread() & 31) : in_);
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        raw_[j][k] = inside(j) ? load16(from + (j << L::kLoadBit) + 4 * k) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  __device__ __forceinline__ void wait(int) {}
  __device__ __forceinline__ bool inside(int j) const {
    return L::kWhole || in_ + (j << L::kLoadBit) < columns_;
  }
  __device__ __forceinline__ void read(uint4 (&raw)[1][kQuads], int, int j) const {
#pragma unroll
    for (int k = 0; k < kQuads; ++k) raw[0][k] = raw_[j][k];
  }

 private:
  uint4 raw_[L::kLoads][kQuads];
  int in_, columns_;
};

// The next rows wait in shared memory, in `stages` buffers: bulk copies bring them, of which a lane starts
// one for each input, or before Hopper copies of 16 bytes by the thread that reads them.
template <typename T, typename L, int kInputs_>
class SharedLoader {
 public:
  static constexpr int kQuads = sizeof(T) / 2;
  static constexpr int kInputs = kInputs_;
  static constexpr int kTileQuads = (static_cast<int>(sizeof(T)) << L::kTileBits) / 16;

  // buffers: kInputs tiles for each stage. full: a barrier for each stage.
  __device__ SharedLoader(uint4* buffers, uint64_t* full, int lane, int columns, int stages)
      : buffers_(buffers), full_(full), lane_(lane), in_(lane_column<L>(lane)), columns_(columns) {
    if (columns < 1 << L::kTileBits) {  // zeros where there is nothing to copy
      for (int i = lane; i < stages * kInputs * kTileQuads; i += 32) buffers_[i] = make_uint4(0, 0, 0, 0);
    }
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      for (int s = 0; s < stages; ++s) init_barrier(shared_address(full_ + s), 1);
    }
#endif
    order_before_copies();
    __syncwarp();
  }
  __device__ __forceinline__ void start(int stage, const T* const (&tile)[kInputs]) {
#if __CUDA_ARCH__ >= 900
    __syncwarp();  // the buffer has been read
    if (lane_ != 0) return;
    const uint32_t bytes = static_cast<uint32_t>(sizeof(T)) * min(columns_, 1 << L::kTileBits);
    const uint32_t full = shared_address(full_ + stage);
    expect(full, kInputs * bytes);
#pragma unroll
    for (int i = 0; i < kInputs; ++i) copy_to_shared(shared_address(buffer(stage, i)), tile[i], bytes, full);
#else
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
#pragma unroll
      for (int j = 0; j < L::kLoads; ++j) {
        if (!inside(j)) continue;
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                           shared_address(buffer(stage, i) + quad_ + quads(j) + k)),
                       "l"(tile[i] + in_ + (j << L::kLoadBit) + 16 / sizeof(T) * k)
                       : "memory");
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait(int stage) {
#if __CUDA_ARCH__ >= 900
    wait_for_phase(shared_address(full_ + stage), phases_ >> stage & 1);
    phases_ ^= 1u << stage;
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  }
  __device__ __forceinline__ bool inside(int j) const {
    return L::kWhole || in_ + (j << L::kLoadBit) < columns_;
  }
  __device__ __forceinline__ void read(uint4 (&raw)[kInputs][kQuads], int stage, int j) const {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) raw[i][k] = buffer(stage, i)[quad_ + quads(j) + k];
    }
  }

 private:
  __device__ __forceinline__ uint4* buffer(int stage, int input) const {
    return buffers_ + (stage * kInputs + input) * kTileQuads;
  }
  static __device__ __forceinline__ constexpr int quads(int j) {
    return (j << L::kLoadBit) * static_cast<int>(sizeof(T)) / 16;
  }

  uint4* buffers_;
  uint64_t* full_;
  uint32_t phases_ = 0;
  int lane_, in_, columns_;
  int quad_ = in_ * static_cast<int>(sizeof(T)) / 16;  // of the first load
};

}  // namespace halo_train::detail
