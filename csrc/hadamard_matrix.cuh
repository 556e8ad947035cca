// Hadamard blocks of m 2^kLogP elements in one pass: y = scale * (x diag(signs)) (I kron M^T kron S)
// diag(out_scale) for a +-1 matrix M of order m and the Sylvester matrix S of order P = 2^kLogP. 16-bit
// input.
//
// A block is a matrix [m, P] of which S transforms the rows and M the columns. A warp takes a slab of 64 or
// 128 columns:
//
// 1. It brings its slab to shared memory and from there, transposed, to the tensor cores, which multiply it
//    by M in tiles of 16. Products of the raw input with +-1 are exact and sums are fp32, so nothing is
//    rounded. A lane then holds column bit 0 and those of the slab from 3 on in registers and does their
//    butterflies.
// 2. One fp32 exchange through shared memory: a thread gets eight neighbouring columns of each slab and does
//    the butterflies on bits 1, 2 and the others.
// 3. Scale, factors, one rounding, whole lines to memory.
//
// Some blocks of at least 512 columns take hadamard_matrix_staying.cuh.

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
  bool split;          // blocks must be located by (row, column): x has gaps, or there are signs or factors
  float scale;
};

// kTiles: tiles of 16 that cover the order. kGroups blocks side by side in a thread block.
template <typename T_, int kTiles_, int kLogP_, int kGroups_, int kLogSlab_ = 6>
struct MatrixLayout {
  using T = T_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kLogP = kLogP_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kLogSlab = kLogSlab_;
  static constexpr int kSlabs = 1 << (kLogP - kLogSlab);
  static_assert((kLogSlab == 6 || kLogSlab == 7) && kSlabs >= 1 && kSlabs <= 8,
                "up to 64 values of a thread");
  static constexpr int kColumns = 1 << (kLogSlab - 3);  // tiles of eight columns in a slab
  static constexpr int kThreads = 32 * kSlabs;          // of a block
  static constexpr int kValues = 8 * kSlabs;            // of a thread after the exchange

  // The raw slab lies where the results of the first tile go. One or two tiles: it is read once for each, the
  // first one last. More would not fit there: it is held in registers.
  static constexpr bool kHold = kTiles > 2;
  // Fragments of the matrix in registers where those of one tile are few, else in shared memory.
  static constexpr bool kOwnMatrix = kLogSlab == 7 && kTiles <= 2;
  static constexpr int kFragments = kTiles * kTiles;
  // Rows of results that a block has room for: the raw slab takes half as many as it has.
  static __host__ __device__ constexpr int rows(int order) { return order < 8 * kTiles ? 8 * kTiles : order; }
  static constexpr size_t shared_bytes(int order) {
    return (sizeof(float) * kGroups * rows(order) << kLogP) + (kOwnMatrix ? 0 : 512 * kFragments);
  }

  // Shared memory holds the results as rows of P words. A warp's raw slab lies in its own columns of the
  // first rows, two raw rows in a piece of the slab's width.
  static constexpr int kRow = 4 << kLogP;  // bytes
  static constexpr int kPiece = 4 << kLogSlab;
  // What is added to the number of a 16-byte vector in a raw row without carry: conflict-free for the rows
  // that one matrix load takes together.
  static __device__ constexpr int raw_swizzle(int row) { return (row >> 1 & 6) | (row & 1); }
  static __device__ constexpr int raw_byte(int row, int vector) {
    return (row >> 1) * kRow + (row & 1) * (kPiece / 2) + (vector ^ raw_swizzle(row)) * 16;
  }
  // The same of a result and its column in a slab: conflict-free for the writes (lanes: column bits 1 and 2,
  // row bits from 0) as for the reads (lanes: column bits 3 to 5).
  static __device__ constexpr int row_swizzle(int row) { return (row & 3) << 3; }
  static __device__ constexpr int column_swizzle(int column) { return (column >> 5 & 1) << 2; }
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

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

}  // namespace detail

// `ahead`: by how many blocks the L2 cache runs ahead of the loads.
//
// Issue slots count here. Addresses are those of a thread's first row, with swizzled bits flipped, plus
// constants, which become part of the instructions, and the fragments of M come as the products want them.
template <typename L, int kMinBlocks, bool kFactors>
__global__ void __launch_bounds__(L::kThreads* L::kGroups, kMinBlocks)
    hadamard_matrix(const MatrixParams<typename L::T> p, const int64_t ahead) {
  using T = typename L::T;
  constexpr int kTiles = L::kTiles;
  constexpr int kSure = 16 * (kTiles - 1) + 4;  // rows that every order of so many tiles has
  constexpr int kAtOnce = 32 / L::kColumns;     // raw rows of a load
  extern __shared__ __align__(1024) char matrix_memory[];
  const int group = L::kGroups == 1 ? 0 : threadIdx.x / L::kThreads;
  const int thread = L::kGroups == 1 ? threadIdx.x : threadIdx.x % L::kThreads;
  const int lane = thread & 31, warp = thread >> 5;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * L::kGroups + group;
  const bool exists = L::kGroups == 1 || block < p.blocks;
  // Bits of addresses that are swizzled are zero in those of slabs.
  const uint32_t shared =
      static_cast<uint32_t>(__cvta_generic_to_shared(matrix_memory)) + group * L::rows(p.order) * L::kRow;
  const uint32_t mine = shared + warp * L::kPiece;

  // First element of a block, and its column in the tensor.
  const auto source = [&](int64_t index, int64_t& column) {
    column = 0;
    if (!p.split) return p.x + index * (p.order << L::kLogP);
    int64_t row;
    uint32_t part;
    detail::locate(index, p.per_row, row, part);
    column = static_cast<int64_t>(part) * (p.order << L::kLogP);
    return p.x + row * p.row_stride + column;
  };
  int64_t column;
  const int loaded = lane / L::kColumns, vector = lane % L::kColumns;  // row and 16-byte vector of a load
  const int place = loaded << L::kLogP | warp << L::kLogSlab | vector << 3;
  const T* const x = source(block, column) + place;
  const uint32_t target = mine + L::raw_byte(loaded, vector);
  const auto raw_place = [&](int r) { return (target ^ L::raw_swizzle(r) * 16) + r / 2 * L::kRow; };
  if (exists) {
#pragma unroll
    for (int r = 0; r < 16 * kTiles; r += kAtOnce) {
      const bool valid = r + kAtOnce <= kSure || r + loaded < p.order;
      detail::copy16_async(raw_place(r), x + (r << L::kLogP), valid);
    }
  }
  // Fragments of M, for all: rows 8 h + member of tile t, columns 4 quad to 4 quad + 3 of tile k. The tensor
  // cores' k numbers the rows of a tile of the block so that a lane's four are neighbours.
  const int quad = lane & 3, member = lane >> 2;
  const uint32_t fragments = static_cast<uint32_t>(__cvta_generic_to_shared(matrix_memory)) +
                             L::kGroups * L::rows(p.order) * L::kRow + 16 * lane;
  constexpr int kWarps = L::kOwnMatrix ? 1 : L::kThreads * L::kGroups / 32;  // that share the work
  constexpr int kEach = (L::kFragments + kWarps - 1) / kWarps;
  uint4 matrix[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = L::kOwnMatrix ? j : j * kWarps + (threadIdx.x >> 5);
    uint32_t a[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Rows beyond the last one give results that nobody stores, columns beyond the last one meet zeros.
      const int row = min(16 * (i / kTiles) + 8 * h + member, p.order - 1);
      const int at = min(16 * (i % kTiles) + 4 * quad, p.order - 4);
      const T* const four = p.matrix + row * p.order + at;
      if constexpr (L::kOwnMatrix) {  // straight to the registers where the products want them
        a[h] = __ldg(reinterpret_cast<const uint32_t*>(four));
        a[h + 2] = __ldg(reinterpret_cast<const uint32_t*>(four) + 1);
      } else {
        const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(four));
        a[h] = pairs.x;
        a[h + 2] = pairs.y;
      }
    }
    matrix[j] = make_uint4(a[0], a[1], a[2], a[3]);
  }
  if constexpr (!L::kOwnMatrix) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = j * kWarps + (threadIdx.x >> 5);
      if (i < L::kFragments) detail::store_shared(fragments + 512 * i, matrix[j]);
    }
  }
  if (p.signs != nullptr && exists) {
    // The signs come while the block does. A lane flips what it has sent for.
    uint4 signs[16 * kTiles / kAtOnce];
#pragma unroll
    for (int r = 0; r < 16 * kTiles; r += kAtOnce) {
      if (r + kAtOnce > kSure && r + loaded >= p.order) continue;
      signs[r / kAtOnce] = __ldg(reinterpret_cast<const uint4*>(p.signs + column + place + (r << L::kLogP)));
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (int r = 0; r < 16 * kTiles; r += kAtOnce) {
      if (r + kAtOnce > kSure && r + loaded >= p.order) continue;
      const uint32_t at = raw_place(r);
      uint4 value = detail::load_shared(at);
      detail::flip_signs<T>(value, signs[r / kAtOnce]);
      detail::store_shared(at, value);
    }
  } else {
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  if constexpr (L::kOwnMatrix) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (!exists) return;
#if __CUDA_ARCH__ >= 900
  if (ahead > 0 && thread == 0 && block + ahead < p.blocks) {
    int64_t unused;
    const T* later = source(block + ahead, unused);
    const uint32_t bytes = sizeof(T) * p.order << L::kLogP;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(later), "r"(bytes) : "memory");
  }
#endif

  const int from = 4 * (lane >> 1 & 3) + 2 * (lane >> 3 & 1) + (lane & 1);  // row that this lane addresses
  const uint32_t rows = mine + L::raw_byte(from, lane >> 4);
  const auto fragment = [&](int k, int n) {
    return detail::load_transposed((rows ^ n * 16) + 8 * k * L::kRow);
  };
  uint4 held[L::kHold ? kTiles : 1][L::kColumns / 2];
  if constexpr (L::kHold) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
#pragma unroll
      for (int n = 0; n < L::kColumns / 2; ++n) held[k][n] = fragment(k, 2 * n);
    }
    __syncwarp();
  }
  const uint32_t base = mine + member * L::kRow + 4 * (2 * quad ^ L::row_swizzle(member));
#pragma unroll
  for (int t = kTiles - 1; t >= 0; --t) {
    float d[L::kColumns][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int index = kTiles * t + k;
      const uint4 four =
          L::kOwnMatrix ? matrix[L::kOwnMatrix ? index : 0] : detail::load_shared(fragments + 512 * index);
      const uint32_t a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < L::kColumns / 2; ++n) {
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
    if (!L::kHold && t == 0) __syncwarp();  // the raw slab has been read
    // d[n][2 h + c]: row member + 8 h of the tile, column 8 n + 2 quad + c.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      constexpr int kCount = 2 * L::kColumns;
      const int row = 16 * t + 8 * h;
      if (row >= kSure && row >= p.order) continue;
      float v[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = d[i >> 1][2 * h + (i & 1)];
      detail::butterfly_registers<0>(v);
      detail::butterfly_registers<1>(v);
      detail::butterfly_registers<2>(v);
      detail::butterfly_registers<3>(v);
      if constexpr (L::kColumns > 8) detail::butterfly_registers<4>(v);
      if (row + 8 <= kSure || row + member < p.order) {
#pragma unroll
        for (int n = 0; n < L::kColumns; ++n) {
          const int flip = (8 * n & 31) | L::column_swizzle(8 * n);
          detail::store_shared((base ^ 4 * flip) + 4 * (8 * n & ~31) + row * L::kRow, v[2 * n], v[2 * n + 1]);
        }
      }
    }
  }
  detail::group_barrier<L::kThreads, L::kGroups>(group);

  // Eight columns of each slab, neighbouring lanes in a row.
  constexpr int kRows = L::kThreads / L::kColumns;  // at a time
  static_assert(kRows % 4 == 0, "rows that a thread takes are swizzled alike");
  const int first = thread / L::kColumns, low = thread % L::kColumns << 3;
  uint32_t at = shared + first * L::kRow + 4 * (low ^ L::row_swizzle(first) ^ L::column_swizzle(low));
  int offset = first << L::kLogP | low;
  T* y = p.y + block * (p.order << L::kLogP) + offset;
#pragma unroll 1
  for (int row = first; row < p.order; row += kRows) {
    float v[L::kValues];
#pragma unroll
    for (int s = 0; s < L::kSlabs; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 four = detail::load_shared((at ^ 16 * h) + s * L::kPiece);
        v[8 * s + 4 * h] = __uint_as_float(four.x), v[8 * s + 4 * h + 1] = __uint_as_float(four.y);
        v[8 * s + 4 * h + 2] = __uint_as_float(four.z), v[8 * s + 4 * h + 3] = __uint_as_float(four.w);
      }
    }
    if constexpr (L::kSlabs > 1) detail::butterfly_registers<3>(v);
    if constexpr (L::kSlabs > 2) detail::butterfly_registers<4>(v);
    if constexpr (L::kSlabs > 4) detail::butterfly_registers<5>(v);
    detail::butterfly_registers<1>(v);
    if constexpr (!kFactors) {
      detail::butterfly_registers_scaled<2>(v, p.scale);
    } else {
      detail::butterfly_registers<2>(v);
#pragma unroll
      for (int s = 0; s < L::kSlabs; ++s) {
        detail::multiply_values<8>(v + 8 * s, p.scale, p.out_scale + column + offset + (s << L::kLogSlab));
      }
    }
#pragma unroll
    for (int s = 0; s < L::kSlabs; ++s) detail::store_values<8>(y + (s << L::kLogSlab), v + 8 * s);
    at += kRows * L::kRow;
    offset += kRows << L::kLogP;
    y += kRows << L::kLogP;
  }
}

// `ahead`: by how many blocks the L2 cache runs ahead of the loads.
}  // namespace halo_train
