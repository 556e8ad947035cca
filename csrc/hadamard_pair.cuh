// Hadamard blocks of 32768 float32 values by two thread blocks of a cluster, half of the input and half of
// the result each. Two of them fit on a multiprocessor and cover for each other's barriers, as one of twice
// the size cannot. For Hopper and later.
//
// Each does the bits of its half that lie within warps (see trade_in_warp). Then the two trade: one goes on
// with the columns whose bit kOwner is zero, of all rows of 1024, the other with the rest, so that the upper
// five bits are in registers. What the other one goes on with is copied to it by the hardware, a warp at a
// time: stores to another thread block cost as much for few bytes as for many.

#pragma once

#include "cluster.cuh"
#include "hadamard_kernel.cuh"

namespace halo_train {

struct PairLayout : HadamardLayout<float, 14, 5, 2, false, 0, false, true> {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kOwner = kLaneBit - 1;         // index bit that is the upper one of the loads'
  static constexpr int kPiece = 1 << (kWarpBit - 1);  // words of a warp for one thread block
  // The columns of either thread block, from the first and from the second half of the rows, then those that
  // wait for the other one to come for them.
  static constexpr int kHalf = 1 << (kLogN - 1);
  static constexpr size_t kPairBytes = 3 * kHalf * sizeof(float);
};

// `ahead`: by how many halves the L2 cache runs ahead of the loads.
template <bool kFactors>
__global__ void __launch_bounds__(PairLayout::kThreads, 2)
    hadamard_pair(const HadamardParams<float> p, const uint32_t ahead) {
  using L = PairLayout;
  constexpr uint32_t kMinus = 0x80000000u;
  extern __shared__ __align__(16) float pair_memory[];
  __shared__ uint64_t received;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const uint32_t half = blockIdx.x, rank = half & 1;
  detail::expect_in_cluster(&received, L::kHalf * sizeof(float));

  // First element of the input of a half, and its column.
  const auto source = [&](uint32_t index, uint32_t& column) {
    constexpr int kLogBlock = L::kLogN + 1;
    column = (index & 1) << L::kLogN;
    if (!p.split) return p.x + (static_cast<int64_t>(index) << L::kLogN);
    const uint32_t blocks = p.axis >> (kLogBlock - L::kVectorBits), row = (index >> 1) / blocks;
    column |= (index >> 1) % blocks << kLogBlock;
    return p.x + row * p.row_stride + column;
  };
  uint32_t column;
  const float* const x = source(half, column);
  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit | warp << L::kWarpBit;
  uint4 raw[1][L::kLoads];
  const auto load = [&] {
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) raw[0][j] = detail::load16(x + in + L::load(j));
  };
  if (p.signs != nullptr) {
    // As many bytes as the input. They come first and wait as bits: values would take the registers that the
    // input comes to, so the compiler must not see through them.
    uint4 signs[L::kLoads];
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      signs[j] = __ldg(reinterpret_cast<const uint4*>(p.signs + column + in + L::load(j)));
    }
    load();
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      bits |= (signs[j].x & kMinus) >> (4 * j) | (signs[j].y & kMinus) >> (4 * j + 1) |
              (signs[j].z & kMinus) >> (4 * j + 2) | (signs[j].w & kMinus) >> (4 * j + 3);
    }
    asm volatile("" : "+r"(bits));
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      raw[0][j].x ^= bits << (4 * j) & kMinus;
      raw[0][j].y ^= bits << (4 * j + 1) & kMinus;
      raw[0][j].z ^= bits << (4 * j + 2) & kMinus;
      raw[0][j].w ^= bits << (4 * j + 3) & kMinus;
    }
  } else {
    load();
  }
  float v[L::kValues];
  transform_tile<L>(raw, {}, v, false, 0);

  // Where a warp's columns of one of the thread blocks lie: in the order of L::word without bit kOwner.
  const auto piece = [&](uint32_t owner) {
    return pair_memory + (owner == rank ? rank * L::kHalf : 2 * L::kHalf) + warp * L::kPiece;
  };
  const int at = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kOwner;
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    constexpr int kPerOwner = L::kLoads / 2;
    const int word = L::word(j << L::kLineBit) & ~(1 << L::kOwner);
    *reinterpret_cast<float4*>(piece(j / kPerOwner) + (at ^ word)) =
        make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
  }
  __syncwarp();
  // Nothing before this barrier makes the compiler wait for the own input first.
#if __CUDA_ARCH__ >= 900
  const uint32_t next = half + ahead;
  if (ahead > 0 && thread == 0 && next < p.total >> L::kLogN) {
    uint32_t unused;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source(next, unused)),
                 "n"(sizeof(float) << L::kLogN)
                 : "memory");
  }
#endif
  const int loads = lane >> 2;
  detail::trade_in_warp<1 << L::kOwner>(v, piece(loads >> 2) + ((loads & 3) << L::kLineBit | (lane & 3)),
                                        loads << 2);

  detail::order_before_copies();
  detail::wait_for_cluster();
  __syncwarp();
  if (lane == 0) {
    detail::copy_in_cluster(pair_memory + rank * L::kHalf + warp * L::kPiece, piece(rank ^ 1),
                            L::kPiece * sizeof(float), &received, rank ^ 1);
  }
  __syncthreads();
  detail::wait_for_all(&received);
  detail::arrive_in_cluster();

  const int low = thread & ((1 << L::kOwner) - 1), high = thread >> L::kOwner;
  const int first = low | static_cast<int>(rank) << L::kOwner | high << L::kLaneBit;
  const float* const from =
      pair_memory + (L::word(low | rank << L::kOwner) & ~(1 << L::kOwner)) + (high << L::kOwner);
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) v[i] = from[i * L::kPiece];
  detail::butterfly_registers<0>(v);
  detail::butterfly_registers<1>(v);
  detail::butterfly_registers<2>(v);
  detail::butterfly_registers<3>(v);
  if constexpr (kFactors) {
    detail::butterfly_registers<4>(v);
    const uint32_t blocks = p.axis >> (L::kLogN + 1 - L::kVectorBits);
    const float* const factors = p.out_scale + ((half >> 1) % blocks << (L::kLogN + 1)) + first;
#pragma unroll
    for (int i = 0; i < L::kValues; ++i) {
      detail::multiply_values<1>(v + i, p.scale, factors + (i << L::kWarpBit));
    }
  } else {
    detail::butterfly_registers_scaled<4>(v, p.scale);
  }
  float* const y = p.y + (static_cast<int64_t>(half >> 1) << (L::kLogN + 1)) + first;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) y[i << L::kWarpBit] = v[i];
  detail::wait_for_cluster();  // the other one has what was copied to it
}

}  // namespace halo_train
