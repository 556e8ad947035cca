// 8-bit matrices transposed at the speed of memory.

#include "quantize.h"
#include "quantize_common.cuh"
#include "transpose_tile.cuh"

namespace halo_train {
namespace {

using namespace detail;

// Bytes that a side, a row's start and both pointers are a multiple of: 16, 4 or 1.
int common_width(const void* x, const void* y, int64_t rows, int64_t cols) {
  const int64_t bits = reinterpret_cast<intptr_t>(x) | reinterpret_cast<intptr_t>(y) | rows | cols;
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

// At most `count` of 16 bytes from addresses that are multiples of kWidth, as is the count.
template <int kWidth>
__device__ __forceinline__ void load_bytes(uint32_t (&word)[4], const uint8_t* p, int64_t count) {
  if constexpr (kWidth == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  } else if constexpr (kWidth == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = 4 * i < count ? __ldg(reinterpret_cast<const uint32_t*>(p) + i) : 0;
  } else {
    uint8_t* byte = reinterpret_cast<uint8_t*>(word);
#pragma unroll
    for (int i = 0; i < 16; ++i) byte[i] = i < count ? __ldg(p + i) : uint8_t{0};
  }
}

constexpr int kByteRows = 256;

template <int kWidth>
__global__ void __launch_bounds__(Tile<kByteRows>::kThreads)
    transpose_bytes_kernel(const uint8_t* x, uint8_t* y, int64_t rows, int64_t cols) {
  using L = Tile<kByteRows>;
  extern __shared__ uint4 shared[];
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared);
  const int group = threadIdx.x % kGroups, word = threadIdx.x / kGroups;
  const int64_t row0 = block_down() * kByteRows, col0 = static_cast<int64_t>(blockIdx.x) * kGroups * 16;
  const int64_t column = col0 + 16 * group;
  uint32_t in[4][4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = row0 + 4 * word + r;
    if (row < rows && column < cols) load_bytes<kWidth>(in[r], x + row * cols + column, cols - column);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Four rows of four bytes: pairs of rows interleaved, then pairs of pairs.
    const uint32_t ab_lo = __byte_perm(in[0][i], in[1][i], 0x5140),
                   ab_hi = __byte_perm(in[0][i], in[1][i], 0x7362);
    const uint32_t cd_lo = __byte_perm(in[2][i], in[3][i], 0x5140),
                   cd_hi = __byte_perm(in[2][i], in[3][i], 0x7362);
    const uint32_t out[4] = {__byte_perm(ab_lo, cd_lo, 0x5410), __byte_perm(ab_lo, cd_lo, 0x7632),
                             __byte_perm(ab_hi, cd_hi, 0x5410), __byte_perm(ab_hi, cd_hi, 0x7632)};
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[L::slot(16 * group + 4 * i + j, word, group)] = out[j];
  }
  __syncthreads();
  store_tile<kByteRows, 16, kWidth>(tile, y, rows, cols, row0, col0);
}

template <int kWidth>
cudaError_t launch_transpose_bytes(const uint8_t* x, uint8_t* y, int64_t rows, int64_t cols,
                                   cudaStream_t stream) {
  constexpr size_t kShared = sizeof(uint32_t) * kGroups * 16 * Tile<kByteRows>::kWords;
  static_assert(kShared <= 48 * 1024, "more has to be asked for");
  const dim3 grid = tile_grid(ceil_div(cols, 16 * kGroups), ceil_div(rows, kByteRows));
  transpose_bytes_kernel<kWidth><<<grid, Tile<kByteRows>::kThreads, kShared, stream>>>(x, y, rows, cols);
  return cudaGetLastError();
}

}  // namespace

cudaError_t transpose_bytes(const void* x, void* y, int64_t rows, int64_t cols, cudaStream_t stream) {
  const auto* from = static_cast<const uint8_t*>(x);
  auto* to = static_cast<uint8_t*>(y);
  switch (common_width(x, y, rows, cols)) {
    case 16:
      return launch_transpose_bytes<16>(from, to, rows, cols, stream);
    case 4:
      return launch_transpose_bytes<4>(from, to, rows, cols, stream);
    default:
      return launch_transpose_bytes<1>(from, to, rows, cols, stream);
  }
}

}  // namespace halo_train
