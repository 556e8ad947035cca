// C = diag(scale_a) (A B^T) diag(scale_b) of 8-bit matrices on Hopper, A [M, K], B [N, K]: int8 with sums in
// int32, e4m3 with those of the tensor cores, which have fewer bits than float32.
//
// A thread block stays and computes tiles of 128 x kTileN; the two of a cluster lie one below the other, so
// that each fetches half of the rows of B for both (multicast). One thread sends for the operands, a ring of
// stages ahead; two warp groups of 64 rows each multiply (wgmma takes both operands from shared memory) with
// kTileN / 2 sums a thread in registers. Large tiles and shared fetches count twice here: long products run
// at the power limit of the GPU, where what does not move is clock.
//
// Between two tiles a group only scales its sums in float32 and rounds them once, in registers. Results of 16
// bits stay there until products of the next tile are under way, and then leave through a staging buffer,
// from where a warp for each group, its helper, stores them. The helper loads the scales, too: no group waits
// for memory.
//
// Where A has a scale for each row and block of the contraction, sums go from one block's scale to the next's
// in place. A group waits for its products for that, and the other's fill the gap. A warp does not multiply
// the upper or lower eight of its rows when none of them has another scale: multiplications cost clock, too.
// B may have a scale for each such block and kTileN rows then, which the sums of a tile share.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "quantize.h"
#include "scaled_matmul_scales.cuh"
#include "shared_address.cuh"

namespace halo_train {

namespace detail {

// What the two sizes of tiles share.
constexpr int kClusterBlocks = 2, kMultipliers = 2;
constexpr int kGroupRows = 64, kBlockRows = kMultipliers * kGroupRows;
constexpr int kStageBytes = 128;  // of a row, as wide as the swizzle
constexpr int kBufferBytes = kGroupRows * 128;
constexpr int kMatmulThreads = 128 * (1 + kMultipliers);
// Rows of tiles of clusters that are walked together, so that their operands are still in the L2 cache.
constexpr uint32_t kWalk = 8;

template <int kTileN>
struct MatmulLayout {
  static constexpr int kBytesA = kBlockRows * kStageBytes, kBytesB = kTileN * kStageBytes;
  static constexpr int kStages = kTileN == 256 ? 4 : 6;
  static constexpr int kHalf = kTileN / 2;                       // columns whose results are staged together
  static constexpr int kBuffers = kHalf / 64;                    // of a group, for them
  static constexpr int kScaleBytes = (kTileN + kGroupRows) * 4;  // of columns and rows, for each group
  static constexpr int kStaging = kStages * (kBytesA + kBytesB);
  static constexpr int kScales = kStaging + kMultipliers * kBuffers * kBufferBytes;
  static constexpr int kBarriers = kScales + kMultipliers * kScaleBytes;
  static constexpr size_t kShared = kBarriers + 16 * kStages;
};

__device__ __forceinline__ void wait_parity(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// An operand in shared memory, as wgmma wants it described: rows of 128 bytes, swizzled, groups of eight rows
// 1024 bytes apart.
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define HALO_8(c, d, i)                                                                             \
  "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3]), "+" c(d[i + 4]), "+" c(d[i + 5]), \
      "+" c(d[i + 6]), "+" c(d[i + 7])
#define HALO_32(c, d, i) HALO_8(c, d, i), HALO_8(c, d, i + 8), HALO_8(c, d, i + 16), HALO_8(c, d, i + 24)
#define HALO_64(c, d, i) HALO_32(c, d, i), HALO_32(c, d, i + 32)
#define HALO_0_TO_63                                                                           \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
  "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,"   \
  "%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define HALO_64_TO_127                                                                          \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"    \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106," \
  "%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,"  \
  "%125,%126,%127"

// sums = a b + (keep ? sums : 0), 64 rows by 256 or 128 columns and 32 bytes of K.
__device__ __forceinline__ void multiply(int (&sums)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" HALO_0_TO_63 "," HALO_64_TO_127
      "}, %128, %129, p;\n}"
      : HALO_64("r", sums, 0), HALO_64("r", sums, 64)
      : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void multiply(int (&sums)[64], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" HALO_0_TO_63 "}, %64, %65, p;\n}"
      : HALO_64("r", sums, 0)
      : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void multiply(float (&sums)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" HALO_0_TO_63 "," HALO_64_TO_127
      "}, %128, %129, p, 1, 1;\n}"
      : HALO_64("f", sums, 0), HALO_64("f", sums, 64)
      : "l"(a), "l"(b), "r"(keep));
}
#undef HALO_8
#undef HALO_32
#undef HALO_64
#undef HALO_0_TO_63
#undef HALO_64_TO_127

// Not read earlier and not written later than here.
__device__ __forceinline__ void stays(uint32_t& word) { asm volatile("" : "+r"(word)::"memory"); }
__device__ __forceinline__ void stays(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }
__device__ __forceinline__ void stays(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

__device__ __forceinline__ void fetch(const CUtensorMap* map, uint32_t to, uint32_t barrier, int column,
                                      int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Into the same place of all thread blocks of the cluster, and the barriers of all are told.
__device__ __forceinline__ void fetch_for_all(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                              int column, int row) {
  constexpr uint16_t kAll = (1 << kClusterBlocks) - 1;
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(kAll)
      : "memory");
}

// Scales of columns 2 quad and the next in each of four times eight columns.
__device__ __forceinline__ void load_factors(float2 (&factors)[4], uint32_t scales, int column, int quad) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(factors[i].x), "=f"(factors[i].y)
                 : "r"(scales + 4 * (column + 8 * i + 2 * quad)));
  }
}

template <typename Out>
__device__ __forceinline__ uint32_t pair(float x, float y) {
  std::conditional_t<std::is_same_v<Out, __half>, __half2, __nv_bfloat162> both;
  both.x = static_cast<Out>(x);
  both.y = static_cast<Out>(y);
  return reinterpret_cast<const uint32_t&>(both);
}

__device__ __forceinline__ void store_shared(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ __forceinline__ float load_shared(uint32_t from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

// Named barriers of a group and its helper. Who arrives does not wait.
__device__ __forceinline__ void helper_sync(int barrier) {
  asm volatile("bar.sync %0, 160;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void helper_arrive(int barrier) {
  asm volatile("bar.arrive %0, 160;" ::"r"(barrier) : "memory");
}

// Row and column of a cluster's tile.
__device__ __forceinline__ void place(uint32_t index, uint32_t tiles_m, uint32_t tiles_n, int& m, int& n) {
  const uint32_t walk = kWalk * tiles_n;
  const uint32_t first = index / walk * kWalk, rest = index % walk;
  const uint32_t rows = min(tiles_m - first, kWalk);
  m = static_cast<int>(first + rest % rows);
  n = static_cast<int>(rest / rows);
}

}  // namespace detail

// kScaleSteps: so many stages share a scale of a row of A; 0: all. Launched in
// clusters of kClusterBlocks. Empty but in a build for sm_90a.
template <QType kType, int kTileN, typename Out, int kScaleSteps>
__global__ void __launch_bounds__(detail::kMatmulThreads, 1)
    scaled_matmul_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                         const __grid_constant__ CUtensorMap c_map, const detail::MatmulScales scales, Out* c,
                         const int m_rows, const int n_rows, const int steps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace detail;
  using L = MatmulLayout<kTileN>;
  constexpr bool kStaged = sizeof(Out) == 2;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t a_tiles = shared_address(shared);
  const uint32_t b_tiles = a_tiles + L::kStages * L::kBytesA, staging = a_tiles + L::kStaging;
  const uint32_t full = a_tiles + L::kBarriers, empty = full + 8 * L::kStages;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  // Of the warps before the groups: 0 sends for operands, 1 and 2 help.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const bool multiplies = warp >= 4;
  const int group = multiplies ? warp / 4 - 1 : warp - 1;
  const uint32_t buffers = staging + group * L::kBuffers * kBufferBytes;
  const uint32_t column_scales = a_tiles + L::kScales + group * L::kScaleBytes;
  const uint32_t row_scales = column_scales + 4 * kTileN;
  const int is_free = 1 + group, is_full = 1 + kMultipliers + group;  // barriers of the staging buffers

  if (threadIdx.x == 0) {
    for (int i = 0; i < L::kStages; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i),
                   "n"(kClusterBlocks * kMultipliers)
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();

  const uint32_t tiles_m = (m_rows + kClusterBlocks * kBlockRows - 1) / (kClusterBlocks * kBlockRows);
  const uint32_t tiles_n = (n_rows + kTileN - 1) / kTileN;
  const uint32_t tiles = tiles_m * tiles_n, clusters = gridDim.x / kClusterBlocks;
  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == L::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (!multiplies) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (uint32_t tile = blockIdx.x / kClusterBlocks; tile < tiles; tile += clusters) {
        int m, n;
        place(tile, tiles_m, tiles_n, m, n);
        const int row_a = (m * kClusterBlocks + rank) * kBlockRows;
        const int row_b = n * kTileN + rank * (kTileN / kClusterBlocks);
        for (int k = 0; k < steps; ++k, advance()) {
          wait_parity(empty + 8 * stage, phase ^ 1);
          const uint32_t barrier = full + 8 * stage;
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                       "n"(L::kBytesA + L::kBytesB)
                       : "memory");
          fetch(&a_map, a_tiles + stage * L::kBytesA, barrier, k * kStageBytes, row_a);
          fetch_for_all(&b_map, b_tiles + stage * L::kBytesB + rank * (L::kBytesB / kClusterBlocks), barrier,
                        k * kStageBytes, row_b);
        }
      }
    } else if (warp > 0 && warp <= kMultipliers) {
      const auto store = [&](int half, int row, int column) {
        if constexpr (kStaged) {
          if (lane == 0 && column >= 0) {
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#pragma unroll
            for (int i = 0; i < L::kBuffers; ++i) {
              asm volatile(
                  "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&c_map),
                  "r"(buffers + i * kBufferBytes), "r"(column + half * L::kHalf + i * 64), "r"(row)
                  : "memory");
            }
            asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
          }
          __syncwarp();
        }
      };
      int old_row = 0, old_column = -1;
      helper_arrive(is_free);
      // Of the last block of the contraction, where sums end.
      const float* last_scales = scales.a;
      int64_t last = 0;
      if constexpr (kScaleSteps > 0) {
        last = (steps - 1) / kScaleSteps;
        last_scales += last * m_rows;
      }
      for (uint32_t tile = blockIdx.x / kClusterBlocks; tile < tiles; tile += clusters) {
        int m, n;
        place(tile, tiles_m, tiles_n, m, n);
        const int row = (m * kClusterBlocks + rank) * kBlockRows + group * kGroupRows, column = n * kTileN;
        const float* from = scales.b;
        int step = scales.b_step;
        if constexpr (kScaleSteps > 0) {
          if (step == kOfTiles) from += last * tiles_n + n, step = 0;
        }
        float by_column[kTileN / 32], by_row[kGroupRows / 32];
#pragma unroll
        for (int i = 0; i < kTileN / 32; ++i) {
          const int at = column + 32 * i + lane;
          by_column[i] = at < n_rows ? __ldg(from + at * step) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kGroupRows / 32; ++i) {
          const int at = row + 32 * i + lane;
          by_row[i] = at < m_rows ? __ldg(last_scales + at * scales.a_step) : 0.0f;
        }
#pragma unroll
        for (float& scale : by_column) stays(scale);  // loaded before the wait
#pragma unroll
        for (float& scale : by_row) stays(scale);
        helper_sync(is_full);  // and nobody needs the scales of the tile before
#pragma unroll
        for (int i = 0; i < kTileN / 32; ++i) store_shared(column_scales + 4 * (32 * i + lane), by_column[i]);
#pragma unroll
        for (int i = 0; i < kGroupRows / 32; ++i) store_shared(row_scales + 4 * (32 * i + lane), by_row[i]);
        store(0, old_row, old_column);
        helper_arrive(is_free);
        helper_sync(is_full);
        store(1, old_row, old_column);
        helper_arrive(is_free);
        old_row = row;
        old_column = column;
      }
      helper_sync(is_full);
      store(0, old_row, old_column);
      helper_arrive(is_free);
      helper_sync(is_full);
      store(1, old_row, old_column);
      if (kStaged && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // A thread for each thread block of the cluster tells it that this group has read the stage before. No
    // fence of the cluster, which took 0.4 us: wgmma has read, and nothing was written.
    const auto release = [&] {
      if (thread < kClusterBlocks) {
        asm volatile(
            "{\n.reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
                empty + 8 * (stage == 0 ? L::kStages - 1 : stage - 1)),
            "r"(thread)
            : "memory");
      }
    };
    using Sum = std::conditional_t<kType == QType::kInt8, int, float>;
    const int quad = lane % 4;
    Sum sums[kTileN / 2] = {};
    uint32_t results[kTileN / 4] = {};  // of the tile before, two of 16 bits each
    const auto send = [&](bool first) {
      wait_parity(full + 8 * stage, phase);
      const uint64_t a = operand(a_tiles + stage * L::kBytesA + group * kGroupRows * kStageBytes);
      const uint64_t b = operand(b_tiles + stage * L::kBytesB);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < kStageBytes / 32; ++i) multiply(sums, a + 2 * i, b + 2 * i, !first || i > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    const auto step = [&] {
      send(false);
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      release();
      advance();
    };
    // Scales the sums of a tile and rounds them; results of 32 bits go to memory at once.
    const auto finish = [&](uint32_t tile) {
#pragma unroll
      for (Sum& sum : sums) stays(sum);
      int m, n;
      place(tile, tiles_m, tiles_n, m, n);
      const int row_in_group = 16 * (warp % 4) + lane / 4;  // and 8 below
      const int row = (m * kClusterBlocks + rank) * kBlockRows + group * kGroupRows + row_in_group;
      const float top = load_shared(row_scales + 4 * row_in_group);
      const float bottom = load_shared(row_scales + 4 * (row_in_group + 8));
      float2 factors[2][4];  // of four times eight columns, and of the next
      load_factors(factors[0], column_scales, 0, quad);
#pragma unroll
      for (int i = 0; i < kTileN / 8; ++i) {
        if (i % 4 == 0 && i + 4 < kTileN / 8) {
          load_factors(factors[(i / 4 + 1) % 2], column_scales, 8 * (i + 4), quad);
        }
        const Sum* s = sums + 4 * i;
        const float2 f = factors[i / 4 % 2][i % 4];
        const float2 above{static_cast<float>(s[0]) * top * f.x, static_cast<float>(s[1]) * top * f.y};
        const float2 below{static_cast<float>(s[2]) * bottom * f.x, static_cast<float>(s[3]) * bottom * f.y};
        if constexpr (kStaged) {
          results[2 * i] = pair<Out>(above.x, above.y);
          results[2 * i + 1] = pair<Out>(below.x, below.y);
        } else {
          const int column = n * kTileN + 8 * i + 2 * quad;
          Out* to = c + static_cast<int64_t>(row) * n_rows + column;
          if (column < n_rows && row < m_rows) *reinterpret_cast<float2*>(to) = above;
          if (column < n_rows && row + 8 < m_rows) *reinterpret_cast<float2*>(to + 8ll * n_rows) = below;
        }
      }
      if constexpr (kStaged) {
#pragma unroll
        for (uint32_t& result : results) stays(result);
      }
    };
    // Hands a half of the results of the tile before to the helper, who gives the scales of this one.
    const auto put_away = [&](int half) {
      helper_sync(is_free);
      if constexpr (kStaged) {
        const int row = 16 * (warp % 4) + lane % 16;
#pragma unroll
        for (int i = 0; i < L::kHalf / 16; ++i) {
          const uint32_t* words = results + half * L::kHalf / 4 + 4 * i;
          const int piece = 2 * (i % 4) + lane / 16;
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                           buffers + i / 4 * kBufferBytes + row * 128 + (piece ^ (row & 7)) * 16),
                       "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                       : "memory");
        }
      }
      helper_arrive(is_full);
    };
    for (uint32_t tile = blockIdx.x / kClusterBlocks; tile < tiles; tile += clusters) {
      send(true);
      advance();
      int k = 1;
      const auto steps_to = [&](int end) {
        for (; k < min(end, steps); ++k) step();
      };
      RowScales of_rows;
      if constexpr (kScaleSteps > 0) {
        int m, n;
        place(tile, tiles_m, tiles_n, m, n);
        const int row = (m * kClusterBlocks + rank) * kBlockRows + group * kGroupRows;
        of_rows.start(scales.a, row + 16 * (warp % 4) + lane / 4, m_rows,
                      scales.b_step == kOfTiles ? scales.b + n : nullptr, tiles_n, kScaleSteps < steps);
      }
      steps_to(2);
      put_away(0);
      if constexpr (kScaleSteps == 0) {
        steps_to(4);
        put_away(1);
        steps_to(steps);
      } else {
        static_assert(kScaleSteps == 2 || kScaleSteps == 4);
        for (steps_to(kScaleSteps); k < steps; steps_to(k + kScaleSteps - 1)) {
          float2 ratios = of_rows.next(m_rows, tiles_n, k + kScaleSteps < steps);
          stays(ratios.x);  // known before the products end
          stays(ratios.y);
          const bool above = !__all_sync(0xffffffffu, ratios.x == 1.0f);
          const bool below = !__all_sync(0xffffffffu, ratios.y == 1.0f);
          asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
          release();
#pragma unroll
          for (Sum& sum : sums) stays(sum);
          if (above) {
#pragma unroll
            for (int i = 0; i < kTileN / 2; i += 4) sums[i] *= ratios.x, sums[i + 1] *= ratios.x;
          }
          if (below) {
#pragma unroll
            for (int i = 2; i < kTileN / 2; i += 4) sums[i] *= ratios.y, sums[i + 1] *= ratios.y;
          }
          send(false);
          advance();
          if (k++ == 4) put_away(1);
        }
        if (steps <= 4) put_away(1);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release();
      finish(tile);
    }
    put_away(0);
    put_away(1);
  }
  cluster_sync();  // nobody leaves while another may still send or tell something
#endif
}

}  // namespace halo_train
