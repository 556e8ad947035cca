// Large Hadamard blocks of m 2^kLogP elements (see hadamard_matrix.cuh), of which one or two fill a
// multiprocessor.
//
// A block is a matrix [m, P] of which S transforms the rows and M the columns. It is cut into slabs of 128
// columns and, for the results, into tiles of 16 rows; a warp computes a tile of a slab:
//
// 1. It takes the raw slab, which lies in shared memory, by transposing matrix loads to the tensor cores,
//    which multiply it by its 16 rows of M. A lane then holds column bits 0 and 3 to 6 in registers and does
//    their butterflies.
// 2. One fp32 exchange through shared memory between the slabs of a tile: a thread gets eight neighbouring
//    columns of each slab and does the butterflies on bits 1, 2 and from 7 on.
// 3. Scale, factors, one rounding, whole lines to memory.
//
// Thread blocks stay and stride over the blocks. When the warps of a slab have read it, the first of them
// sends for that of the next block, and for the L2 cache to call in the one after; the others do not wait for
// that. What a warp reads in step 2 are as many words as it writes in step 1, so it writes the next block
// where it has just read: one barrier a block is enough.

#pragma once

#include "hadamard_matrix.cuh"
#include "shared_address.cuh"

namespace halo_train {

// kTiles: tiles of 16 that cover the order.
template <typename T_, int kTiles_, int kLogP_>
struct StayingMatrixLayout {
  using T = T_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kLogP = kLogP_;
  static constexpr int kLogSlab = 7;
  static constexpr int kLogSlabs = kLogP - kLogSlab;
  static constexpr int kSlabs = 1 << kLogSlabs;
  static_assert(kLogSlabs == 2 || kLogSlabs == 3, "64 values fit the registers of a thread");
  static constexpr int kThreads = 32 * kTiles * kSlabs;
  static constexpr int kColumns = 1 << (kLogSlab - 3);  // tiles of eight columns in a slab

  // Bytes from row to row of a raw slab: the eight rows of a matrix load lie in different banks.
  static constexpr int kRawRow = (2 << kLogSlab) + 16;
  static constexpr int kRawSlab = 16 * kTiles * kRawRow;

  // Words of a result. Columns: bit 5 moves four banks on, for the reads (lanes: column bits 3 to 5). Rows:
  // bit 0 moves eight, bit 1 sixteen, for the writes (lanes: column bits 1 and 2, row bits from 0).
  static constexpr int kRow = 136;
  static __device__ constexpr int column_word(int column) {
    return (column & 31) + (column >> 5 & 1) * 36 + (column >> 6 & 1) * 68;
  }
  // The exchange of a tile is a square of kSlabs x kSlabs units, of 16 / kSlabs rows of a slab each.
  static constexpr int kUnitRows = 16 / kSlabs;
  static constexpr int kMinor = kUnitRows * kRow;
  static constexpr int kMajor = kSlabs * kMinor + (kUnitRows == 2 ? 16 : 0);
  static constexpr int kTileWords = kSlabs * kMajor;

  // Barriers, raw slabs, results.
  static constexpr int kHeader = 8 * kSlabs;
  static_assert(kHeader % 16 == 0, "raw slabs take 16-byte stores");
  static constexpr size_t kSharedBytes = kHeader + kSlabs * kRawSlab + sizeof(float) * kTiles * kTileWords;
};

namespace detail {

__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(phase)
                 : "memory");
  } while (done == 0);
}

// Called by the warps of a slab, one for each tile, when they have read it; of the first one it returns after
// all the others' calls. Numbers of barriers follow those of the tiles. With the number in a register the
// compiler reserves all sixteen, which leaves a multiprocessor four thread blocks: as many as there are.
template <int kTiles>
__device__ __forceinline__ void slab_read(int slab, int tile) {
  if constexpr (kTiles == 1) {
    __syncwarp();
  } else if (tile == 0) {
    asm volatile("bar.sync %0, %1;" ::"r"(kTiles + 1 + slab), "n"(32 * kTiles) : "memory");
  } else {
    asm volatile("bar.arrive %0, %1;" ::"r"(kTiles + 1 + slab), "n"(32 * kTiles) : "memory");
  }
}

}  // namespace detail

// kColumnwise: with signs, factors or both.
template <typename L, int kMinBlocks, bool kColumnwise>
__global__ void __launch_bounds__(L::kThreads, kMinBlocks)
    hadamard_matrix_staying(const MatrixParams<typename L::T> p) {
  using T = typename L::T;
  constexpr int kTiles = L::kTiles;
  extern __shared__ __align__(16) char shared_bytes[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile = kTiles == 1 ? 0 : warp / L::kSlabs, slab = warp % L::kSlabs;
  char* const raw_bytes = shared_bytes + L::kHeader + slab * L::kRawSlab;
  const uint32_t raw = detail::shared_address(raw_bytes);
  const uint32_t arrived = detail::shared_address(shared_bytes) + 8 * slab;
  float* const results =
      reinterpret_cast<float*>(shared_bytes + L::kHeader + L::kSlabs * L::kRawSlab) + tile * L::kTileWords;

  // First element of a block, and its column in the tensor.
  const auto source = [&](int64_t index, int64_t& column) {
    int64_t row;
    uint32_t part;
    detail::locate(index, p.per_row, row, part);
    column = static_cast<int64_t>(part) * (p.order << L::kLogP);
    return p.x + row * p.row_stride + column;
  };
  // A warp sends for its raw slab; each lane arrives when its part is there.
  constexpr int kLanes = 1 << (L::kLogSlab - 3);  // 16-byte vectors in a row of a slab
  const auto fetch = [&](int64_t index) {
    int64_t unused;
    const int row = lane / kLanes, vector = lane % kLanes;
    const T* x = source(index, unused) + (slab << L::kLogSlab) + (row << L::kLogP) + (vector << 3);
    const uint32_t to = raw + row * L::kRawRow + vector * 16;
#pragma unroll
    for (int i = 0; i < 16 * kTiles; i += 32 / kLanes) {
      if (i + row >= p.order) continue;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * L::kRawRow),
                   "l"(x + (i << L::kLogP))
                   : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(arrived) : "memory");
  };
  const auto call_ahead = [&](int64_t index) {
#if __CUDA_ARCH__ >= 900
    if (slab == 0 && lane == 0 && index < p.blocks) {
      int64_t unused;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source(index, unused)),
                   "r"(p.order * 2 << L::kLogP)
                   : "memory");
    }
#endif
  };

  int64_t block = blockIdx.x;
  const int64_t stride = gridDim.x;
  if (tile == 0) {
    // Rows that pad the order stay zero.
    for (int i = p.order * L::kRawRow + 16 * lane; i < L::kRawSlab; i += 512) {
      *reinterpret_cast<uint4*>(raw_bytes + i) = make_uint4(0, 0, 0, 0);
    }
    if (lane == 0) {
      asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(arrived) : "memory");
    }
    __syncwarp();
    fetch(block);
  }

  // The warp's rows of M.
  const int quad = lane & 3, member = lane >> 2;
  uint32_t a[kTiles][4];
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int i = 16 * tile + 8 * (h & 1) + member, j = 16 * k + 8 * (h >> 1) + 2 * quad;
      a[k][h] = i < p.order && j < p.order
                    ? __ldg(reinterpret_cast<const uint32_t*>(p.matrix + i * p.order + j))
                    : 0;
    }
  }
  __syncthreads();

  // Bits 15 - i and 31 - i of flips[k][s]: signs of the i-th pair of k's fragments, from half s of the slab.
  constexpr int kPairs = 2 * L::kColumns;
  uint32_t flips[kTiles][kPairs / 16];
  int64_t flips_column = -1;

  // Words of the warp's unit 0 and from unit to unit, at writes and at reads. They change roles with every
  // block.
  float* write = results + slab * L::kMinor;
  int write_step = L::kMajor;
  const float* read = results + slab * L::kMajor;
  int read_step = L::kMinor;
  for (uint32_t phase = 0; block < p.blocks; block += stride, phase ^= 1) {
    if constexpr (kColumnwise) {
      int64_t column;
      source(block, column);
      if (column != flips_column) {
        flips_column = column;
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
#pragma unroll
          for (int s = 0; s < kPairs / 16; ++s) {
            uint32_t bits = 0;
            for (int i = 0; i < 16 && p.signs != nullptr; ++i) {
              const int row = 16 * k + 8 * (i & 1) + 2 * quad;
              if (row >= p.order) continue;
              const T* sign = p.signs + column + (row << L::kLogP) + (slab << L::kLogSlab) + 64 * s +
                              8 * (i >> 1) + member;
              bits |= static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(sign[0]) >> 15) << (15 - i);
              bits |= static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(sign[1 << L::kLogP]) >> 15)
                      << (31 - i);
            }
            flips[k][s] = bits;
          }
        }
      }
    }

    detail::wait_barrier(arrived, phase);
    // Not with the loads of the first block, which would wait for it.
    if (tile == 0 && block == blockIdx.x) call_ahead(block + stride);
    // d[4 n + 2 h + c]: row member + 8 h of the tile, column 8 n + 2 quad + c.
    float d[4 * L::kColumns];
    const uint32_t from = raw + (lane & 15) * L::kRawRow + (lane >> 4) * 16;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < L::kColumns; n += 2) {
        uint4 b = detail::load_transposed(from + 16 * k * L::kRawRow + 16 * n);
        if constexpr (kColumnwise) {
          const uint32_t bits = flips[k][n / 8];
          const int pair = 2 * (n & 7);
          b.x ^= bits << pair & 0x80008000u;
          b.y ^= bits << (pair + 1) & 0x80008000u;
          b.z ^= bits << (pair + 2) & 0x80008000u;
          b.w ^= bits << (pair + 3) & 0x80008000u;
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float* const sum = d + 4 * (n + s);
          const float4 c =
              k == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : make_float4(sum[0], sum[1], sum[2], sum[3]);
          detail::Pair<T>::mma(sum, a[k], s == 0 ? make_uint2(b.x, b.y) : make_uint2(b.z, b.w), c);
        }
      }
    }
    detail::slab_read<kTiles>(slab, tile);
    if (tile == 0) {
      if (block + stride < p.blocks) fetch(block + stride);
      call_ahead(block + 2 * stride);
    }

    detail::butterfly_registers<0>(d);
    detail::butterfly_registers<2>(d);
    detail::butterfly_registers<3>(d);
    detail::butterfly_registers<4>(d);
    detail::butterfly_registers<5>(d);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 8 * h + member;
      if (16 * tile + row >= p.order) continue;
      float* const to = write + row / L::kUnitRows * write_step + row % L::kUnitRows * L::kRow + 2 * quad;
#pragma unroll
      for (int n = 0; n < L::kColumns; ++n) {
        *reinterpret_cast<float2*>(to + L::column_word(8 * n)) =
            make_float2(d[4 * n + 2 * h], d[4 * n + 2 * h + 1]);
      }
    }
    detail::group_barrier<32 * L::kSlabs, kTiles>(tile);

    // Eight columns of each slab, neighbouring lanes in a row.
    constexpr int kStep = 32 / kLanes;  // rows at a time
    constexpr int kValues = 8 * L::kSlabs;
    const int low = lane % kLanes << 3;
    const int64_t first = block * (p.order << L::kLogP);
#pragma unroll
    for (int r = 0; r < L::kUnitRows; r += kStep) {
      const int unit_row = r + lane / kLanes;
      const int row = 16 * tile + slab * L::kUnitRows + unit_row;
      if (row >= p.order) continue;
      const float* const at = read + unit_row * L::kRow + L::column_word(low);
      float v[kValues];
#pragma unroll
      for (int s = 0; s < L::kSlabs; ++s) {
        const float4 f = *reinterpret_cast<const float4*>(at + s * read_step);
        const float4 g = *reinterpret_cast<const float4*>(at + s * read_step + 4);
        v[8 * s] = f.x, v[8 * s + 1] = f.y, v[8 * s + 2] = f.z, v[8 * s + 3] = f.w;
        v[8 * s + 4] = g.x, v[8 * s + 5] = g.y, v[8 * s + 6] = g.z, v[8 * s + 7] = g.w;
      }
      detail::butterfly_registers<3>(v);
      detail::butterfly_registers<4>(v);
      if constexpr (L::kSlabs > 4) detail::butterfly_registers<5>(v);
      detail::butterfly_registers<1>(v);
      const int offset = (row << L::kLogP) + low;
      if (!kColumnwise || p.out_scale == nullptr) {
        detail::butterfly_registers_scaled<2>(v, p.scale);
      } else {
        detail::butterfly_registers<2>(v);
#pragma unroll
        for (int s = 0; s < L::kSlabs; ++s) {
          detail::multiply_values<8>(v + 8 * s, p.scale,
                                     p.out_scale + flips_column + offset + (s << L::kLogSlab));
        }
      }
      T* const y = p.y + first + offset;
#pragma unroll
      for (int s = 0; s < L::kSlabs; ++s) detail::store_values<8>(y + (s << L::kLogSlab), v + 8 * s);
    }
    __syncwarp();  // the units have been read
    float* const swapped = const_cast<float*>(read);
    read = write, write = swapped;
    const int step = read_step;
    read_step = write_step, write_step = step;
  }
}

}  // namespace halo_train
