// Tiles of 8-bit matrices that are transposed in shared memory.

#pragma once

#include <cstdint>

namespace halo_train::detail {

// Tiles of kRows rows. A thread reads four neighbouring rows of a group of columns and packs, for each
// column, the four bytes into a word; words go through shared memory and leave as 16 bytes along the rows.
constexpr int kGroups = 8;  // of columns in a tile

template <int kRows>
struct Tile {
  static constexpr int kWords = kRows / 4;  // of one column
  static constexpr int kThreads = kWords * kGroups;
  static constexpr int kChunks = kRows / 16;

  // Eight groups write the same words of different columns at once; columns are a multiple of 32 banks apart,
  // so each group gets banks of its own by swapping words in fours, which keeps 16-byte reads whole.
  static __device__ __forceinline__ int slot(int column, int word, int group) {
    return column * kWords + (word ^ group << 2);
  }
};

// At most `count` of 16 bytes to addresses that are multiples of kWidth, as is the count.
template <int kWidth>
__device__ __forceinline__ void store_bytes(uint8_t* p, const uint32_t* from, int64_t count) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  if constexpr (kWidth == 16) {
    *reinterpret_cast<uint4*>(p) = v;
  } else {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWidth == 4) {
        if (4 * i < count) reinterpret_cast<uint32_t*>(p)[i] = word[i];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (4 * i + j < count) p[4 * i + j] = static_cast<uint8_t>(word[i] >> (8 * j));
        }
      }
    }
  }
}

// Writes a tile of kGroups * kColumns columns from shared memory to y [cols, rows].
template <int kRows, int kColumns, int kWidth>
__device__ __forceinline__ void store_tile(const uint32_t* tile, uint8_t* y, int64_t rows, int64_t cols,
                                           int64_t row0, int64_t col0) {
  using L = Tile<kRows>;
#pragma unroll
  for (int n = 0; n < kGroups * kColumns * L::kChunks / L::kThreads; ++n) {
    const int i = threadIdx.x + n * L::kThreads, column = i / L::kChunks, chunk = i % L::kChunks;
    const int64_t row = row0 + 16 * chunk;
    if (col0 + column >= cols || row >= rows) continue;
    store_bytes<kWidth>(y + (col0 + column) * rows + row,
                        tile + L::slot(column, 4 * chunk, column / kColumns), rows - row);
  }
}

}  // namespace halo_train::detail
