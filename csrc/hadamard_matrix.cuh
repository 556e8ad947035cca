// Hadamard blocks of m 2^kLogP elements in one pass: y = scale * (x diag(signs)) (I kron M^T kron S)
// diag(out_scale) for a +-1 matrix M of order m and the Sylvester matrix S of order P = 2^kLogP. 16-bit
// input.
//
// A block is a matrix [m, P] of which S transforms the rows and M the columns. A warp takes a slab of 64
// columns:
//
// 1. It brings its slab to shared memory and from there, transposed, to the tensor cores, which multiply it
// by M. M is
//    padded with zeros to tiles of 16. Products of the raw input with +-1 are exact and sums are fp32, so
//    nothing is rounded. A lane then holds column bits 0 and 3 to 5 in registers and does their butterflies.
// 2. One fp32 exchange through shared memory: a thread gets eight neighbouring columns of each slab and does
// the
//    butterflies on bits 1, 2 and from 6 on.
// 3. Scale, factors, one rounding, whole lines to memory.
//
// Rows of 512 columns and more take hadamard_matrix_staying.cuh.

#pragma once

#include "hadamard_kernel.cuh"

namespace halo_train {

template <typename T>
struct MatrixParams {
  const T* x;
  T* y;                    // contiguous
  const T* signs;          // one value per position, of which only the sign bit is used, or nullptr
  const float* out_scale;  // one factor per position, or nullptr
  const T* matrix;         // [order, order], contiguous
  int order;               // a multiple of 4
  int64_t blocks;
  int64_t row_stride;  // elements between rows of x
  uint32_t per_row;    // blocks in a row
  float scale;
};

// kTiles: tiles of 16 that cover the order. kGroups blocks side by side in a thread block.
template <typename T_, int kTiles_, int kLogP_, int kGroups_>
struct MatrixLayout {
  using T = T_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kLogP = kLogP_;
  static constexpr int kGroups = kGroups_;
  static_assert(kLogP >= 6 && kLogP <= 8, "up to 32 values of a thread");
  static constexpr int kSlabs = 1 << (kLogP - 6);
  static constexpr int kThreads = 32 * kSlabs;  // of a block
  static constexpr int kValues = 8 * kSlabs;    // of a thread after the exchange

  // The raw slab and the results share memory. Few tiles: the raw slab lies where the results of the last
  // tile go, and is read once for each tile. Many: it is held in registers.
  static constexpr bool kHold = kTiles > 2;
  static constexpr int kRawWords = kHold ? 0 : 1024 * (kTiles - 1);  // before the raw slab
  // 32-bit words of a slab.
  static __host__ __device__ constexpr int slab_words(int order) {
    return kHold ? 64 * order : 1024 * kTiles;
  }

  // Byte of a 16-byte chunk of the raw slab, conflict-free for the rows that one matrix load takes together.
  static __device__ constexpr int chunk(int row, int column) {
    return row << 7 | (column ^ ((row >> 1 & 6) | (row & 1))) << 4;
  }
  // Word of a result, conflict-free for the writes (lanes: column bits 1 and 2, row bits from 0) as for the
  // reads (lanes: column bits 3 to 5).
  static __device__ constexpr int word(int row, int column) {
    return row << 6 | (column ^ (column >> 5 & 1) << 2 ^ (row & 3) << 3);
  }
};

namespace detail {

__device__ __forceinline__ void copy16_async(uint32_t target, const void* source, bool valid) {
  // Zeros where there is nothing to copy.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// Fragments of two tiles of eight columns for one tile of sixteen rows.
__device__ __forceinline__ uint4 load_transposed(uint32_t address) {
  uint4 b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
               : "r"(address)
               : "memory");
  return b;
}

}  // namespace detail

// `ahead`: by how many blocks the L2 cache runs ahead of the loads.
template <typename L, int kMinBlocks, bool kFactors>
__global__ void __launch_bounds__(L::kThreads* L::kGroups, kMinBlocks)
    hadamard_matrix(const MatrixParams<typename L::T> p, const int64_t ahead) {
  using T = typename L::T;
  constexpr int kTiles = L::kTiles;
  extern __shared__ float shared_memory[];
  const int group = L::kGroups == 1 ? 0 : threadIdx.x / L::kThreads;
  const int thread = L::kGroups == 1 ? threadIdx.x : threadIdx.x % L::kThreads;
  const int lane = thread & 31, warp = thread >> 5;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * L::kGroups + group;
  if (L::kGroups > 1 && block >= p.blocks) return;
  const int slab = L::slab_words(p.order);
  float* const shared = shared_memory + group * L::kSlabs * slab;
  float* const mine = shared + warp * slab;

  // First element of a block, and its column in the tensor.
  const auto source = [&](int64_t index, int64_t& column) {
    int64_t row;
    uint32_t part;
    detail::locate(index, p.per_row, row, part);
    column = static_cast<int64_t>(part) * (p.order << L::kLogP);
    return p.x + row * p.row_stride + column;
  };
  int64_t column;
  const T* const x = source(block, column);
  const uint32_t raw = static_cast<uint32_t>(__cvta_generic_to_shared(mine + L::kRawWords));
#pragma unroll
  for (int r = 0; r < 16 * kTiles; r += 4) {
    const int row = r + (lane >> 3);
    const bool valid = row < p.order;
    detail::copy16_async(raw + L::chunk(row, lane & 7),
                         x + ((valid ? row : 0) << L::kLogP) + (warp << 6 | (lane & 7) << 3), valid);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (p.signs != nullptr) {
    for (int row = lane >> 3; row < p.order; row += 4) {
      uint4* const v =
          reinterpret_cast<uint4*>(reinterpret_cast<char*>(mine + L::kRawWords) + L::chunk(row, lane & 7));
      const T* s = p.signs + column + (row << L::kLogP) + (warp << 6 | (lane & 7) << 3);
      uint4 value = *v;
      detail::flip_signs<T>(value, __ldg(reinterpret_cast<const uint4*>(s)));
      *v = value;
    }
  }
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  if (ahead > 0 && thread == 0 && block + ahead < p.blocks) {
    int64_t unused;
    const T* later = source(block + ahead, unused);
    const uint32_t bytes = sizeof(T) * p.order << L::kLogP;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(later), "r"(bytes) : "memory");
  }
#endif

  // The tensor cores' k numbers the rows of a tile so that a lane's four are neighbours: rows 4 q to 4 q + 3.
  const int quad = lane & 3, member = lane >> 2;
  const int from = 4 * (lane >> 1 & 3) + 2 * (lane >> 3 & 1) + (lane & 1);  // row that this lane addresses
  const auto fragment = [&](int k, int n) {
    return detail::load_transposed(raw + L::chunk(16 * k + from, n + (lane >> 4)));
  };
  uint4 held[L::kHold ? kTiles : 1][4];
  if constexpr (L::kHold) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) held[k][n] = fragment(k, 2 * n);
    }
    __syncwarp();
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    float d[8][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      // Rows of M: member and member + 8 of tile t; columns 4 quad to 4 quad + 3 of tile k.
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 16 * t + 8 * h + member, j = 16 * k + 4 * quad;
        uint2 pairs = make_uint2(0, 0);
        if (i < p.order && j < p.order)
          pairs = __ldg(reinterpret_cast<const uint2*>(p.matrix + i * p.order + j));
        a[h] = pairs.x;
        a[h + 2] = pairs.y;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint4 b;
        if constexpr (L::kHold) {
          b = held[k][n];
        } else {
          b = fragment(k, 2 * n);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float* const sum = d[2 * n + s];
          const float4 c =
              k == 0 ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : make_float4(sum[0], sum[1], sum[2], sum[3]);
          detail::Pair<T>::mma(sum, a, s == 0 ? make_uint2(b.x, b.y) : make_uint2(b.z, b.w), c);
        }
      }
    }
    if (!L::kHold && t == kTiles - 1) __syncwarp();  // the raw slab has been read
    // d[n][2 h + c]: row member + 8 h of the tile, column 8 n + 2 quad + c.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (16 * t + 8 * h >= p.order) continue;
      float v[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = d[i >> 1][2 * h + (i & 1)];
      detail::butterfly_registers<0>(v);
      detail::butterfly_registers<1>(v);
      detail::butterfly_registers<2>(v);
      detail::butterfly_registers<3>(v);
      const int row = 16 * t + 8 * h + member;
      if (row < p.order) {
        const int base = L::word(row, 2 * quad);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          *reinterpret_cast<float2*>(mine + (base ^ L::word(0, 8 * n))) = make_float2(v[2 * n], v[2 * n + 1]);
        }
      }
    }
  }
  detail::group_barrier<L::kThreads, L::kGroups>(group);

  // Eight columns of each slab, a lane in eight of the same row.
  T* const y = p.y + block * (p.order << L::kLogP);
  constexpr int kRounds = (128 * kTiles + L::kThreads - 1) / L::kThreads;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int item = thread + round * L::kThreads;
    if (item >= p.order << 3) return;
    const int row = item >> 3, low = (item & 7) << 3;
    const float* const at = shared + L::word(row, low);
    const float* const other = shared + (L::word(row, low) ^ 4);
    float v[L::kValues];
#pragma unroll
    for (int s = 0; s < L::kSlabs; ++s) {
      const float4 f = *reinterpret_cast<const float4*>(at + s * slab);
      const float4 g = *reinterpret_cast<const float4*>(other + s * slab);
      v[8 * s] = f.x, v[8 * s + 1] = f.y, v[8 * s + 2] = f.z, v[8 * s + 3] = f.w;
      v[8 * s + 4] = g.x, v[8 * s + 5] = g.y, v[8 * s + 6] = g.z, v[8 * s + 7] = g.w;
    }
    if constexpr (L::kLogP > 6) detail::butterfly_registers<3>(v);
    if constexpr (L::kLogP > 7) detail::butterfly_registers<4>(v);
    detail::butterfly_registers<1>(v);
    const int offset = (row << L::kLogP) + low;
    if constexpr (!kFactors) {
      detail::butterfly_registers_scaled<2>(v, p.scale);
    } else {
      detail::butterfly_registers<2>(v);
#pragma unroll
      for (int s = 0; s < L::kSlabs; ++s) {
        detail::multiply_values<8>(v + 8 * s, p.scale, p.out_scale + column + offset + 64 * s);
      }
    }
#pragma unroll
    for (int s = 0; s < L::kSlabs; ++s) detail::store_values<8>(y + offset + 64 * s, v + 8 * s);
  }
}

}  // namespace halo_train
