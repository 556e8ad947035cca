// The scales of the operands of scaled_matmul_kernel.cuh.

#pragma once

namespace halo_train::detail {

constexpr int kOfTiles = 2;  // b_step with kScaleSteps: scales of B [blocks, tiles of kTileN rows]

struct MatmulScales {
  const float* a;  // with kScaleSteps [blocks, m_rows]
  const float* b;
  int a_step, b_step;  // 1: one a row; 0: one for all
};

// Loads here; whoever uses it first waits.
__device__ __forceinline__ float load_ahead(const float* from) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

// Scales of a row and of the eighth below it, times that of the tile of B if there are such, of one block of
// the contraction after the other, loaded a block before they are used.
struct RowScales {
  const float *at, *tile_at;
  int below;
  float2 now, after;
  float tile_after;

  // Where there are more blocks, those of the next.
  __device__ __forceinline__ void load(bool more, int rows, int tiles) {
    if (more) at += rows;
    after = {load_ahead(at), load_ahead(at + below)};
    tile_after = 1.0f;
    if (tile_at == nullptr) return;
    if (more) tile_at += tiles;
    tile_after = load_ahead(tile_at);
  }
  __device__ __forceinline__ void go_on() { now = {after.x * tile_after, after.y * tile_after}; }

  // `first_tile`: the scale of this tile in the first block, or nullptr.
  __device__ __forceinline__ void start(const float* scales, int row, int rows, const float* first_tile,
                                        int tiles, bool more) {
    const int first = min(row, rows - 1);
    at = scales + first;
    below = min(row + 8, rows - 1) - first;
    tile_at = first_tile;
    load(false, rows, tiles);
    go_on();
    load(more, rows, tiles);
  }
  // Goes on to the next block: what takes sums from the scales before to those. Exact, as scales are powers
  // of two: the division is (tests/test_products.py).
  __device__ __forceinline__ float2 next(int rows, int tiles, bool more) {
    const float2 before = now;
    go_on();
    load(more, rows, tiles);
    return {__fdividef(before.x, now.x), __fdividef(before.y, now.y)};
  }
};

}  // namespace halo_train::detail
