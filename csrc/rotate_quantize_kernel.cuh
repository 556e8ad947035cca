// Rows that are made, rotated and rounded in one pass: rows of y H in 8 bits, one scale a row, read once and
// written once; y is x diag(col_scale), a norm, or a gated activation (row_sources.cuh). A row stays in the
// registers of its warps from its load to its rounding, so its largest magnitude costs no second look at
// memory; the next row is fetched meanwhile (row_loader.cuh). A thread block stays and works on as many rows
// at once as it holds. Large rows of bfloat16 have a kernel of their own on Hopper
// (rotate_quantize_relay.cuh).
//
// A warp holds a tile of 32 * kValues elements of a row. Each bit of their index is transformed where it
// happens to be (layouts: RotateLayout):
//
// 1. Tensor-core products with a constant +-1 matrix do bits 0, 1, 4, 5 and 6 (or 7, see kLineInLanes), in
// fp32 sums of exact products.
// 2. Bit 2 is a register bit, as are 3 and those of the loads. Where the block has bits in lanes too,
// products
//    of the sums, in two bfloat16 terms, do bit 3, those in lanes and the highest of the loads.
// 3. Blocks of two warps: the bit of the warp trades places with a register bit, half of the values through
//    shared memory. Blocks of more: one exchange, instead of products of sums, makes all other bits register
//    bits.
// 4. The last butterfly is not done before the largest magnitude is known, max(|a + b|, |a - b|) = |a| + |b|,
//    but with the rounding, in three operations for two values.
//
// But for exchanges, a thread ends with 16 neighbouring elements: one store of 16 bytes.

#pragma once

#include "round.cuh"
#include "row_sources.cuh"

namespace halo_train {

template <typename Source>
struct RotateParams {
  Source source;
  int rows, cols, warps, log_block;  // warps of a row
  int rows_at_once;                  // of a thread block
  int stages;                        // rows on their way, for SharedLoader
  bool shared_stage;                 // they share the memory of the exchange
  bool int8;                         // else e4m3: a branch where values are stored, not a kernel of its own
  uint8_t* q;
  float* scale;
  uint32_t* tensor_amax;  // see QuantizeRowsArgs
  float norm, inverse_cols;
  float qmax, inverse_qmax;  // of the 8-bit type
};

constexpr int kNotRotated = -1;

// Dynamic shared memory: float32 values that warps exchange, rows on their way, factors of columns.
template <typename Source, typename L, bool kRotated, bool kLean>
struct RotateShared {
  using Loader = std::conditional_t<kLean, detail::SharedLoader<typename Source::T, L, Source::kInputs>,
                                    typename Source::template Loader<L>>;
  using Factors = typename Source::template Factors<kRotated, L::kLogWarps>;
  static constexpr bool kStaged = !std::is_same_v<Loader, detail::RegisterLoader<typename Source::T, L>>;
  static constexpr int kTile = 1 << L::kTileBits;
  static constexpr int kExchange = 4 * 32 * L::kGiven;  // bytes of a warp, likewise
  static constexpr int kStage =
      kStaged ? static_cast<int>(sizeof(typename Source::T)) * Source::kInputs * kTile : 0;
  static constexpr int kFactors =
      static_cast<int>(sizeof(typename Factors::Word)) * Factors::kWords * kTile / 8;

  // Several rows in a thread block, which share the factors. Those that wait in registers are faster in
  // thread blocks of their own, as are lean ones.
  static constexpr bool kGrouped = kStaged && !kLean;
  static constexpr int kStages = kGrouped ? detail::kMaxStages : 1;

  // Bytes of a thread block.
  static __host__ __device__ size_t bytes(int warps, int rows_at_once, int stages, bool shared_stage) {
    const int stage = shared_stage ? 0 : stages * kStage;
    return static_cast<size_t>(warps) * (rows_at_once * (kExchange + stage) + kFactors);
  }
};

namespace detail {

template <int kLogValues, int kLogWarps, int kBlockBits>
using RotatedLayout = RotateLayout<kLogValues, kLogWarps, (kLogWarps > 0 || kBlockBits == kLogValues + 5),
                                   (kLogValues > 5 && (kLogWarps == 1 || kBlockBits > kLogValues + 3))>;

// Barrier of the warps that share a block of the rotation, the group-th of the thread block.
template <bool kGroups, int kThreads, typename Row>
__device__ __forceinline__ void exchange_barrier(const Row& row, int group) {
  if constexpr (kGroups) {
    // Above those of the rows, of which there are at most four then.
    asm volatile("bar.sync %0, %1;" ::"r"(8 + group), "n"(kThreads) : "memory");
  } else {
    row.barrier();
  }
}

}  // namespace detail

// kBlockBits: log2 of the block within a tile; 7 stands for those up to it, of which the matrix knows, 0 for
// any, kNotRotated for none. kGroups: a row has several blocks of several warps each, which wait for
// themselves only. kLean: the next row waits in shared memory whatever its source says, so that 96 registers
// do and 20 warps fit a multiprocessor instead of 16.
template <typename Source, int kLogValues, int kLogWarps, int kBlockBits, bool kGroups, bool kLean>
__global__ void __launch_bounds__(32 * (kLean ? detail::kLeanWarps / 2 : detail::kMaxRowWarps), kLean ? 2 : 1)
    rotate_quantize_kernel(const RotateParams<Source> p) {
  using namespace detail;
  using T = typename Source::T;
  using L = RotatedLayout<kLogValues, kLogWarps, kBlockBits>;
  constexpr bool kRotated = kBlockBits != kNotRotated;
  // Products of sums, where the block has bits in lanes, and the register bit of the last butterfly.
  constexpr bool kSums =
      kRotated && !L::kExchange && (L::kTrade || kLogValues < 6 || kBlockBits > L::kLaneBit);
  constexpr bool kTwisted = kRotated && !kSums && !L::kExchange;
  constexpr int kLast = L::kExchange ? kLogValues - 1 : !kSums ? 3 : kLogValues > 5 ? L::kTraded : 2;
  using Shared = RotateShared<Source, L, kRotated, kLean>;
  using Loader = typename Shared::Loader;
  using Factors = typename Shared::Factors;
  extern __shared__ uint4 shared[];
  constexpr bool kPair = kLogWarps == 1 && !kGroups;  // two warps make a row
  __shared__ __align__(8) uint32_t warp_amax[2][kMaxRowWarps];
  __shared__ float warp_sums[2][kMaxRowWarps];
  __shared__ uint64_t full[kMaxRowWarps][kMaxStages];
  __shared__ uint4 matrix[32];
  __shared__ uint4 sum_signs[kSums ? 32 : 1];
  __shared__ uint32_t minus_identity[kSums ? 32 : 1];

  const RowGroup<!Shared::kGrouped> group(p.warps);
  const int lane = group.lane, warp = group.warp, first_warp = group.group * p.warps;
  const int block_warp = first_warp + warp;
  const int log_block = kLogWarps > 0 ? L::kTileBits + kLogWarps : kBlockBits > 0 ? kBlockBits : p.log_block;

  const int twist = kTwisted ? twist_of(kBlockBits == 7 ? p.log_block : log_block) : 0;

  float* const exchange = reinterpret_cast<float*>(shared);
  uint4* memory = shared + p.warps * p.rows_at_once * (Shared::kExchange / 16);
  // Where they share memory, within what the warp itself writes for the exchange, so that it has been read by
  // then.
  uint4* const stages = p.shared_stage ? shared + block_warp * (Shared::kExchange / 16)
                                       : memory + block_warp * p.stages * (Shared::kStage / 16);
  if (!p.shared_stage) memory += p.warps * p.rows_at_once * p.stages * (Shared::kStage / 16);
  auto* const factors =
      reinterpret_cast<typename Factors::Word*>(memory) + 32 * warp * L::kLoads * Factors::kWords + lane;

  const int tile0 = warp << L::kTileBits;
  Loader loader(stages, full[block_warp], lane, p.cols - tile0, p.stages);
  const int rows_at_once = Shared::kGrouped ? p.rows_at_once : 1, row_stages = Shared::kStaged ? p.stages : 1;
  const int first = blockIdx.x * rows_at_once + group.group, step = gridDim.x * rows_at_once;
  const auto start = [&](int stage, int row) {
    if (row >= p.rows) return;
    const T* tile[Source::kInputs];
    p.source.tiles(tile, row, tile0);
    loader.start(stage, tile);
  };
  const auto keep_matrices = [&] {
    if (!kRotated || block_warp > 0) return;
    matrix[lane] = rotate_matrix<L>(kBlockBits == 7 ? p.log_block : log_block, kTwisted);
    if constexpr (kSums) {
      if (log_block > 7) {
        const SumMatrix sums = sum_matrix<L>(log_block);
        sum_signs[lane] = sums.signs, minus_identity[lane] = sums.minus_identity;
      }
    }
  };
  // Before the factors or after them: so that ptxas keeps the thread's index instead of reading it anew for
  // every row, which costs 3 to 7%.
  if constexpr (L::kLineInLanes) keep_matrices();
  // The factors before the first row: they are needed first, and come from the L2 cache. Thread blocks that
  // hold one row ask for all of theirs at once.
  constexpr bool kFactors = Factors::kWords > 0;
  float columns[kFactors && !Shared::kGrouped ? L::kLoads : 1][8];
  if constexpr (kFactors && !Shared::kGrouped) {
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) columns[j][i] = 0.0f;
      if (loader.inside(j)) p.source.columns(columns[j], tile0 + lane_column<L>(lane) + (j << L::kLoadBit));
    }
  }
  for (int s = 0; s < row_stages; ++s) start(s, first + s * step);
  if constexpr (!L::kLineInLanes) keep_matrices();
  if constexpr (kFactors) {
    const auto keep = [&](int j, const Factors& f) {
#pragma unroll
      for (int w = 0; w < Factors::kWords; ++w) factors[32 * (j * Factors::kWords + w)] = f.word[w];
    };
    if constexpr (Shared::kGrouped) {
#pragma unroll 4
      for (int j = group.group; j < L::kLoads; j += rows_at_once) {  // the rows share the work
        Factors f{};
        if (loader.inside(j)) {
          f = p.source.template factors<Factors>(tile0 + lane_column<L>(lane) + (j << L::kLoadBit),
                                                 twist_sign(lane, twist));
        }
        keep(j, f);
      }
    } else {
#pragma unroll
      for (int j = 0; j < L::kLoads; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) columns[j][i] *= twist_sign(lane, twist);
        keep(j, Factors(columns[j]));
      }
    }
  }

  __syncthreads();
  uint32_t largest = 0;
  int parity = 0, stage = 0;
  for (int row = first; row < p.rows;
       row += step, parity ^= 1, stage = stage + 1 == row_stages ? 0 : stage + 1) {
    loader.wait(stage);
    RowState state;
    if constexpr (Source::kNorm == Norm::kLayer) {
      p.source.statistics(state, loader, stage, L::kLoads, p.cols, group, warp_sums[0] + first_warp,
                          warp_sums[1] + first_warp);
    }
    float v[L::kValues];
    uint4 raw[Source::kInputs][Loader::kQuads];
    const auto read_factors = [&](int j) {
      Factors f;
      if constexpr (!kFactors) f.flip = __float_as_uint(twist_sign(lane, twist)) >> 31 ? 0x80008000u : 0;
#pragma unroll
      for (int w = 0; w < Factors::kWords; ++w) f.word[w] = factors[32 * (j * Factors::kWords + w)];
      return f;
    };
    if constexpr (kRotated) {
      const Signs signs(matrix[lane]);
#pragma unroll
      for (int j = 0; j < L::kLoads; j += 2) {
        Terms<Source::kTerms> low, high;
        loader.read(raw, stage, j);
        p.source.terms(low, raw, read_factors(j), state);
        loader.read(raw, stage, j + 1);
        p.source.terms(high, raw, read_factors(j + 1), state);
        multiply_tile<Source::kNegated, Source::kFlips>(low, high, signs, v + 8 * j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < L::kLoads; ++j) {
        loader.read(raw, stage, j);
        float eight[8];
        p.source.values(eight, raw, read_factors(j), state);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[8 * j + i] = loader.inside(j) ? eight[i] : 0.0f;
      }
    }
    if (!Shared::kStaged || !p.shared_stage) start(stage, row + row_stages * step);
    float squares = 0.0f;
    if constexpr (Source::kNorm == Norm::kRms) {
      squares = warp_sum(state.squares.share());
      if (lane == 0) warp_sums[parity][block_warp] = squares;
    }

    // Where the stages share the memory of other warps: other lanes have read theirs.
    if constexpr (Shared::kStaged && kLogWarps > 0) __syncwarp();
    if constexpr (kRotated && kLast != 2) butterfly_registers<2>(v);
    if constexpr (kSums) {
      if (kLogValues > 5 || log_block > 7) {
        multiply_sums(v, SumMatrix{sum_signs[lane], minus_identity[lane]});
      } else {
        butterfly_registers<3>(v);
      }
    }
    if constexpr (L::kTrade) {
      const bool upper = block_warp & 1;
      float4* const mine = reinterpret_cast<float4*>(exchange) + block_warp * 8 * L::kGiven + lane;
      trade_values<L>(v, mine, mine + (upper ? -8 : 8) * L::kGiven, upper,
                      [&] { exchange_barrier<kGroups, 32 * L::kWarps>(group, block_warp >> kLogWarps); });
    } else if constexpr (L::kExchange) {
      butterfly_registers<3>(v);
      butterfly_registers<4>(v);
      if constexpr (kLogValues > 5) butterfly_registers<5>(v);
      {
        const int thread = read_thread();
        const int base = L::word((thread & 3) << L::kLaneBit | (thread >> 2 & 7) << 4 |
                                 (first_warp + (thread >> 5)) << L::kTileBits);
        float* const flipped[4] = {exchange + base, exchange + (base ^ 4), exchange + (base ^ 8),
                                   exchange + (base ^ 12)};
#pragma unroll
        for (int i = 0; i < L::kValues; i += 4) {
          const int word = L::before(i);
          *reinterpret_cast<float4*>(flipped[word >> 2 & 3] + (word & ~15)) =
              make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
      }
      exchange_barrier<kGroups, 32 * L::kWarps>(group, block_warp >> kLogWarps);
      {
        constexpr int kWide = L::kLowBits < 2 ? 1 << L::kLowBits : 4;  // words of one read
        const int thread = threadIdx.x & (32 * L::kWarps - 1);
        const int base =
            L::word(thread << L::kLowBits) + (block_warp >> kLogWarps << (L::kTileBits + kLogWarps));
        const float* const flipped[4] = {exchange + base, exchange + (base ^ 4), exchange + (base ^ 8),
                                         exchange + (base ^ 12)};
#pragma unroll
        for (int i = 0; i < L::kValues; i += kWide) {
          const int word = L::word(L::after(i));
          const float* from = flipped[word >> 2 & 3] + (word & ~L::kSwizzled);
          if constexpr (kWide == 4) {
            const float4 f = *reinterpret_cast<const float4*>(from);
            v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
          } else if constexpr (kWide == 2) {
            const float2 f = *reinterpret_cast<const float2*>(from);
            v[i] = f.x, v[i + 1] = f.y;
          } else {
            v[i] = *from;
          }
        }
      }
      constexpr int kFirst = L::kLowBits;
      if constexpr (kFirst < kLogValues - 1) butterfly_registers<kFirst>(v);
      if constexpr (kFirst + 1 < kLogValues - 1) butterfly_registers<kFirst + 1>(v);
      if constexpr (kFirst + 2 < kLogValues - 1) butterfly_registers<kFirst + 2>(v);
      if constexpr (kFirst + 3 < kLogValues - 1) butterfly_registers<kFirst + 3>(v);
      if constexpr (kFirst + 4 < kLogValues - 1) butterfly_registers<kFirst + 4>(v);
    } else if constexpr (kRotated && !kSums) {
      if (log_block > 7) butterfly_registers<4>(v);
      if constexpr (kLogValues > 5) {
        if (log_block > 8) butterfly_registers<5>(v);
      }
    }

    uint32_t best[2] = {};  // of floats, whose bits compare as they do and NaN above all
#pragma unroll
    for (int i = 0; i < L::kValues; i += 2) {
      const auto size = [&](int k) {
        return kRotated ? __float_as_uint(fabsf(v[k]) + fabsf(v[k | 1 << kLast])) : magnitude(v[k]);
      };
      if (!kRotated || !(i >> kLast & 1))
        best[i >> 1 & 1] = __vimax3_u32(best[i >> 1 & 1], size(i), size(i + 1));
    }
    uint32_t amax = max(best[0], best[1]);
    if (p.q == nullptr) {
      largest = max(largest, amax);
      if constexpr (kLogWarps > 0) group.barrier();  // the shared memory has been read
      continue;
    }
    if (Shared::kStaged && kLogWarps > 0 && p.shared_stage) order_before_copies();
    if (p.tensor_amax != nullptr) {
      amax = __ldg(p.tensor_amax);
      if constexpr (kLogWarps > 0) group.barrier();
    } else {
      amax = __reduce_max_sync(0xffffffffu, amax);
      if (kLogWarps > 0 || p.warps > 1) {
        if (lane == 0) warp_amax[parity][block_warp] = amax;
        group.barrier();
        if constexpr (kPair) {
          const uint2 both = *reinterpret_cast<const uint2*>(warp_amax[parity] + first_warp);
          amax = max(both.x, both.y);
        } else {
          amax = __reduce_max_sync(0xffffffffu, lane < p.warps ? warp_amax[parity][first_warp + lane] : 0);
        }
        if constexpr (Source::kNorm == Norm::kRms) {
          squares = warp_sum(lane < p.warps ? warp_sums[parity][first_warp + lane] : 0.0f);
        }
      }
    }
    if (Shared::kStaged && p.shared_stage) start(stage, row + row_stages * step);
    float norm = p.norm;
    if constexpr (Source::kNorm == Norm::kRms) {
      state.rstd = rsqrtf(squares * p.inverse_cols + p.source.eps);
      norm *= state.rstd;
    }
    amax = magnitude(__uint_as_float(amax) * norm);
    const float factor = norm * inverse_of(amax, p.qmax);

    uint8_t* q = p.q + static_cast<int64_t>(row) * p.cols;
    const auto store = [&](auto qtype, bool upper) {
      constexpr QType kType = decltype(qtype)::value;
      if constexpr (kRotated) {
        last_butterfly<kLast>(v, factor, upper);
      } else {
#pragma unroll
        for (int i = 0; i < L::kValues; ++i) v[i] *= factor;
      }
      if constexpr (!kRotated) {
        const int out = tile0 + lane_column<L>(lane);
#pragma unroll
        for (int j = 0; j < L::kLoads; ++j) {
          const float* d = v + 8 * j;
          const uint2 bytes = {round4<kType>(d[0], d[1], d[2], d[3]), round4<kType>(d[4], d[5], d[6], d[7])};
          if (loader.inside(j)) *reinterpret_cast<uint2*>(q + out + (j << L::kLoadBit)) = bytes;
        }
      } else if constexpr (L::kExchange) {
        q += ((threadIdx.x & (32 * L::kWarps - 1)) << L::kLowBits) +
             (warp >> kLogWarps << (L::kTileBits + kLogWarps));
        constexpr int kStep = L::kLowBits == 3 ? 8 : 4;
#pragma unroll
        for (int i = 0; i < L::kValues; i += kStep) {
          const uint32_t bytes = round4<kType>(v[i], v[i + 1], v[i + 2], v[i + 3]);
          if constexpr (L::kLowBits == 3) {
            *reinterpret_cast<uint2*>(q + L::after(i)) =
                make_uint2(bytes, round4<kType>(v[i + 4], v[i + 5], v[i + 6], v[i + 7]));
          } else if constexpr (L::kLowBits == 2) {
            *reinterpret_cast<uint32_t*>(q + L::after(i)) = bytes;
          } else if constexpr (L::kLowBits == 1) {
            *reinterpret_cast<uint16_t*>(q + L::after(i)) = static_cast<uint16_t>(bytes);
            *reinterpret_cast<uint16_t*>(q + L::after(i + 2)) = static_cast<uint16_t>(bytes >> 16);
          } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) q[L::after(i + k)] = static_cast<uint8_t>(bytes >> (8 * k));
          }
        }
      } else {
        const int out = (kTwisted ? L::of_lane(lane, twist) : L::of_lane(lane)) |
                        (warp - upper) << L::kTileBits | L::before(static_cast<int>(upper) << L::kTraded);
#pragma unroll
        for (int i = 0; i < L::kValues; i += 16) {
          const bool other = L::kTrade && (i >> L::kTraded & 1);
          const int at = out + (other ? L::before(i ^ 1 << L::kTraded) | 1 << L::kTileBits : L::before(i));
          const float* d = v + i;
          const uint4 bytes =
              make_uint4(round4<kType>(d[0], d[1], d[2], d[3]), round4<kType>(d[4], d[5], d[6], d[7]),
                         round4<kType>(d[8], d[9], d[10], d[11]), round4<kType>(d[12], d[13], d[14], d[15]));
          if (L::kWhole || at < p.cols) *reinterpret_cast<uint4*>(q + at) = bytes;
        }
      }
    };
    const auto store_half = [&](bool upper) {
      if (p.int8) {
        store(std::integral_constant<QType, QType::kInt8>{}, upper);
      } else {
        store(std::integral_constant<QType, QType::kE4M3>{}, upper);
      }
    };
    if (L::kTrade && (block_warp & 1)) {
      store_half(true);
    } else {
      store_half(false);
    }
    // Last, so that nobody waits for one warp's store.
    if ((warp | lane) == 0) {
      if (p.tensor_amax == nullptr || row == 0) p.scale[row] = scale_of(amax, p.qmax, p.inverse_qmax);
      if constexpr (Source::kNorm != Norm::kNone) p.source.rstd[row] = state.rstd;
      if constexpr (Source::kNorm == Norm::kLayer) p.source.mean[row] = state.mean;
    }
  }
  if (p.q == nullptr) {
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) atomicMax(p.tensor_amax, largest);
  }
}

}  // namespace halo_train
