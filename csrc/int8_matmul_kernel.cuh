// C = diag(scale_a) (A B^T) diag(scale_b) of int8 matrices on Hopper, A [M, K], B [N, K], sums in int32.
//
// A thread block stays and computes tiles of 128 x kTileN; the two of a cluster lie one below the other, so
// that each fetches half of the rows of B for both (multicast). One thread sends for the operands, a ring of
// stages ahead; two warp groups of 64 rows each multiply (wgmma takes both operands from shared memory) with
// kTileN / 2 sums a thread in registers. Sums are scaled in float32, rounded once, and leave through a
// staging buffer. Large tiles and shared fetches count twice here: long products run at the power limit of
// the GPU, where what does not move is clock.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "shared_address.cuh"

namespace halo_train {

namespace detail {

// What the two sizes of tiles share.
constexpr int kClusterBlocks = 2, kMultipliers = 2;
constexpr int kGroupRows = 64, kBlockRows = kMultipliers * kGroupRows;
constexpr int kStageBytes = 128;  // of a row, as wide as the swizzle
constexpr int kStagingBytes = kGroupRows * 128;
constexpr int kInt8Threads = 128 * (1 + kMultipliers);
// Rows of tiles of clusters that are walked together, so that their operands are still in the L2 cache.
constexpr int kWalk = 8;

template <int kTileN>
struct Int8Layout {
  static constexpr int kBytesA = kBlockRows * kStageBytes, kBytesB = kTileN * kStageBytes;
  static constexpr int kStages = kTileN == 256 ? 4 : 6;  // 192 KB
  static constexpr int kStaging = kStages * (kBytesA + kBytesB);
  static constexpr int kBarriers = kStaging + 2 * kMultipliers * kStagingBytes;
  static constexpr size_t kShared = 1024 + kBarriers + 16 * kStages;  // 1024: to align
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

#define HALO_8(d, i)                                                                          \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define HALO_32(d, i) HALO_8(d, i), HALO_8(d, i + 8), HALO_8(d, i + 16), HALO_8(d, i + 24)
#define HALO_64(d, i) HALO_32(d, i), HALO_32(d, i + 32)

// sums = a b + (keep ? sums : 0), 64 rows by 256 or 128 columns and 32 bytes of K.
__device__ __forceinline__ void multiply(int (&sums)[128], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
      "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,"
      "%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,"
      "%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,"
      "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p;\n}"
      : HALO_64(sums, 0), HALO_64(sums, 64)
      : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void multiply(int (&sums)[64], uint64_t a, uint64_t b, int keep) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
      "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p;\n}"
      : HALO_64(sums, 0)
      : "l"(a), "l"(b), "r"(keep));
}
#undef HALO_8
#undef HALO_32
#undef HALO_64

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

template <typename Out>
__device__ __forceinline__ void put_pair(uint32_t to, float x, float y) {
  if constexpr (std::is_same_v<Out, float>) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
  } else {
    std::conditional_t<std::is_same_v<Out, __half>, __half2, __nv_bfloat162> pair;
    pair.x = static_cast<Out>(x);
    pair.y = static_cast<Out>(y);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(reinterpret_cast<const uint32_t&>(pair))
                 : "memory");
  }
}

// Row and column of a cluster's tile.
__device__ __forceinline__ void place(int64_t index, int tiles_m, int tiles_n, int& m, int& n) {
  const int64_t walk = static_cast<int64_t>(kWalk) * tiles_n;
  const int first = static_cast<int>(index / walk) * kWalk, rest = static_cast<int>(index % walk);
  const int rows = min(tiles_m - first, kWalk);
  m = first + rest % rows;
  n = rest / rows;
}

struct Int8Scales {
  const float* a;
  const float* b;
  int a_step, b_step;  // 1: one a row; 0: one for all
};

}  // namespace detail

// Launched in clusters of kClusterBlocks. Empty but in a build for sm_90a.
template <int kTileN, typename Out>
__global__ void __launch_bounds__(detail::kInt8Threads, 1)
    int8_matmul_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                       const __grid_constant__ CUtensorMap c_map, const detail::Int8Scales scales,
                       const int m_rows, const int n_rows, const int steps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace detail;
  using L = Int8Layout<kTileN>;
  extern __shared__ char unaligned[];
  const uint32_t a_tiles = (shared_address(unaligned) + 1023) & ~1023u;
  const uint32_t b_tiles = a_tiles + L::kStages * L::kBytesA, staging = a_tiles + L::kStaging;
  const uint32_t full = a_tiles + L::kBarriers, empty = full + 8 * L::kStages;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int group = static_cast<int>(threadIdx.x) / 128 - 1, thread = threadIdx.x % 128;

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

  const int tiles_m = (m_rows + kClusterBlocks * kBlockRows - 1) / (kClusterBlocks * kBlockRows);
  const int tiles_n = (n_rows + kTileN - 1) / kTileN;
  const int64_t tiles = static_cast<int64_t>(tiles_m) * tiles_n, clusters = gridDim.x / kClusterBlocks;
  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == L::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int64_t tile = blockIdx.x / kClusterBlocks; tile < tiles; tile += clusters) {
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
    constexpr int kColumns = 128 / sizeof(Out);  // of a staging buffer
    constexpr int kScales = kTileN / 64;         // pairs of column scales that a lane keeps for its warp
    const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
    const int row_in_group = 16 * warp + lane / 4;
    int sums[kTileN / 2];
    for (int64_t tile = blockIdx.x / kClusterBlocks; tile < tiles; tile += clusters) {
      int m, n;
      place(tile, tiles_m, tiles_n, m, n);
      // Scales now, so that they are there when the sums are.
      const int first_row = (m * kClusterBlocks + rank) * kBlockRows + group * kGroupRows;
      const int row = first_row + row_in_group;
      const float top = row < m_rows ? __ldg(scales.a + row * scales.a_step) : 0.0f;
      const float bottom = row + 8 < m_rows ? __ldg(scales.a + (row + 8) * scales.a_step) : 0.0f;
      float left[kScales], right[kScales];
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        const int column = n * kTileN + 8 * (kScales * (lane / 4) + i) + 2 * quad;
        left[i] = column < n_rows ? __ldg(scales.b + column * scales.b_step) : 0.0f;
        right[i] = column < n_rows ? __ldg(scales.b + (column + 1) * scales.b_step) : 0.0f;
      }
      for (int k = 0; k < steps; ++k) {
        wait_parity(full + 8 * stage, phase);
        const uint64_t a = operand(a_tiles + stage * L::kBytesA + group * kGroupRows * kStageBytes);
        const uint64_t b = operand(b_tiles + stage * L::kBytesB);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < kStageBytes / 32; ++i) multiply(sums, a + 2 * i, b + 2 * i, k | i);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (k > 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          release();
        }
        advance();
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release();
#pragma unroll
      for (int i = 0; i < kTileN / 2; ++i) asm volatile("" : "+r"(sums[i])::"memory");  // not read earlier

#pragma unroll
      for (int part = 0; part < kTileN / kColumns; ++part) {
        const uint32_t buffer = staging + (2 * group + part % 2) * kStagingBytes;
        if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          const int j = part * (kColumns / 8) + i;  // columns 8 j + 2 quad and the next
          const float l = __shfl_sync(0xffffffffu, left[j % kScales], j / kScales * 4 + quad);
          const float r = __shfl_sync(0xffffffffu, right[j % kScales], j / kScales * 4 + quad);
          const int byte = (8 * i + 2 * quad) * static_cast<int>(sizeof(Out));
          const uint32_t to =
              buffer + row_in_group * 128 + ((byte / 16) ^ (row_in_group & 7)) * 16 + byte % 16;
          const int* s = sums + 4 * j;
          put_pair<Out>(to, static_cast<float>(s[0]) * top * l, static_cast<float>(s[1]) * top * r);
          put_pair<Out>(to + 8 * 128, static_cast<float>(s[2]) * bottom * l,
                        static_cast<float>(s[3]) * bottom * r);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        if (thread == 0) {
          asm volatile(
              "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
              "cp.async.bulk.commit_group;" ::"l"(&c_map),
              "r"(buffer), "r"(n * kTileN + part * kColumns), "r"(first_row)
              : "memory");
        }
      }
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  cluster_sync();  // nobody leaves while another may still send or tell something
#endif
}

}  // namespace halo_train
