// Large rows of bfloat16 that are rotated and rounded in one pass, by warps of two kinds (Hopper): a row
// fills so many registers that no more than two fit a multiprocessor, and warps of one row wait for each
// other in every phase (rotate_quantize_kernel.cuh). Here
//
// - producers take tiles of 1024 elements, whatever row they belong to, as bulk copies bring them; they do
//   ten bits of the index by products and put float32 sums into shared memory;
// - consumers hold a row in registers, do the bits above, take the largest magnitude, round and store;
//
// so products of one row, butterflies of another and the wait for the largest magnitude of a third overlap.
// Barriers in shared memory say which parts of a row have been made and read. A thread block stays on its
// multiprocessor and strides over the rows.

#pragma once

#include <cmath>

#include "occupancy.cuh"
#include "round.cuh"
#include "row_sources.cuh"

namespace halo_train {

struct RelayParams {
  const __nv_bfloat16* x;
  int64_t stride;
  const float* col_scale;  // [cols] powers of two, for kernels with kScaled
  int rows, cols;
  int groups;   // of consumers: rows in registers
  int buffers;  // rows in shared memory, in float32
  int parts;    // of a row, which have barriers of their own
  bool int8;    // else e4m3
  uint8_t* q;
  float* scale;
  float norm, qmax, inverse_qmax;
};

namespace detail {

// 20 warps: 12 producers and two groups of consumers share 1920 x 32 registers. Fewer producers do not hide
// the latency of their products, consumers with 64 values a thread leave room for no more.
struct Relay {
  static constexpr int kProducers = 12, kConsumers = 8, kThreads = 32 * (kProducers + kConsumers);
  static constexpr int kProducerRegisters = 64, kConsumerRegisters = 144;
  static constexpr int kTile = 1024;  // elements of a producer
  static constexpr int kLogValues = 7, kValues = 1 << kLogValues;
  static constexpr int kShare = 32 * kValues;  // elements of a consumer warp
  static constexpr int kMaxParts = kConsumers;

  // Tiles on their way to a producer. Factors take the room of the third.
  template <bool kScaled>
  static constexpr int kSlots = kScaled ? 2 : 3;
  template <bool kScaled>
  static size_t bytes(int cols, int buffers) {
    return static_cast<size_t>(cols) * (4 * buffers + (kScaled ? 2 : 0)) +
           2 * kTile * kProducers * kSlots<kScaled>;
  }

  // Bits of the index of a tile, from the lowest.
  //     loads: pair of values (0) | lane 2 (1) | lanes 0, 1 (2, 3) | lanes 3, 4 (4, 5) | words (6 ... 9)
  //     after the products: four registers (1, 0) | lanes 2, 3, 4 (2, 3, 6) | lanes 0, 1 (4, 5) |
  //         registers (7, 8, 9)
  // Two bits of four results side by side are the lowest of the index, so that they are stored to shared
  // memory as they are and a consumer reads four codes that are neighbours.
  static __device__ __forceinline__ int loaded(int lane) {
    return (lane & 3) << 2 | (lane >> 2 & 1) << 1 | lane >> 3 << 4;
  }
  static __device__ __forceinline__ int multiplied(int lane) {
    return (lane & 3) << 4 | (lane >> 2 & 3) << 2 | lane >> 4 << 6;
  }
  // Word of shared memory of four values: bit 5 is added to bank bit 3, so that 16-byte accesses of both
  // kinds of warps are free of conflicts.
  static __device__ __forceinline__ int word(int index) { return index ^ (index >> 5 & 1) << 3; }
};

// A fragment of the +-1 matrix for bits 0, 2, 3 and 6. k (column): 0, 2, 3, 6; m (row): 2, 3, 6, 0.
__device__ __forceinline__ uint4 relay_matrix() {
  const int lane = threadIdx.x & 31;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t pair = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = lane >> 2 | (i & 1) << 3, k = (lane & 3) << 1 | h | i >> 1 << 3;
      const int row = m >> 3 | (m & 3) << 1 | (m >> 2 & 1) << 3;  // in the order of k
      const uint32_t negative = __popc(row & k) & 1;
      pair |= (Pair<__nv_bfloat16>::kOne | negative << 15) << (16 * h);
    }
    a[i] = pair;
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

}  // namespace detail

// kLogBlock: of the rotation, 12 to 15. Empty but in a build for sm_90a.
template <bool kScaled, int kLogBlock>
__global__ void __launch_bounds__(detail::Relay::kThreads, 1) rotate_quantize_relay(const RelayParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using namespace detail;
  using R = Relay;
  constexpr int kSlots = R::kSlots<kScaled>, kSlotWords = R::kTile / 2;
  extern __shared__ uint4 shared[];
  // Of rows with an even number and an odd one. With a barrier for each part and one buffer, one for all rows
  // would not do: a producer that had nothing to do with the part in the row before could take an earlier
  // phase for the one that it waits for.
  __shared__ uint64_t made[2][R::kMaxParts], read[2][R::kMaxParts], arrived[R::kProducers * kSlots];
  __shared__ uint32_t warp_amax[2][2][R::kConsumers];

  // In registers: the compiler would read a special register for each use.
  uint32_t made_at, read_at;
  asm volatile("mov.u32 %0, %1;" : "=r"(made_at) : "r"(shared_address(made)));
  asm volatile("mov.u32 %0, %1;" : "=r"(read_at) : "r"(shared_address(read)));
  const auto barrier = [](uint32_t at, int row, int part) {
    return at + 8 * R::kMaxParts * (row & 1) + 8 * part;
  };
  // Uniform, as the compiler cannot know of threadIdx.x.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int tiles = p.cols / R::kTile, consumers = p.cols / R::kShare;
  const int first_row = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
  const int rows = (p.rows - first_row + step - 1) / step;
  float* const values = reinterpret_cast<float*>(shared);
  const auto buffer = [&](int row) { return values + (p.buffers == 2 && row & 1 ? p.cols : 0); };
  uint32_t* const slots = reinterpret_cast<uint32_t*>(shared + p.buffers * (p.cols / 4));
  uint4* const factors = reinterpret_cast<uint4*>(slots + R::kProducers * kSlots * kSlotWords);

  // What a producer asks for next.
  const uint32_t own_slots = shared_address(slots) + 4 * kSlotWords * kSlots * warp;
  const uint32_t own_arrived = shared_address(arrived) + 8 * kSlots * warp;
  int next_tile = warp, rows_left = rows;
  const __nv_bfloat16* next = p.x + first_row * p.stride + warp * R::kTile;
  const int64_t next_row = step * p.stride - p.cols;
  const auto ask = [&](int slot) {
    if (next_tile >= tiles) {
      next_tile -= tiles;
      --rows_left;
      next += next_row;
    }
    if (rows_left <= 0) return;
    if (lane == 0) {
      const uint32_t arrives = own_arrived + 8 * slot;
      expect(arrives, 4 * kSlotWords);
      copy_to_shared(own_slots + 4 * kSlotWords * slot, next, 4 * kSlotWords, arrives);
    }
    next_tile += R::kProducers;
    next += R::kProducers * R::kTile;
  };
  if (warp < R::kProducers) {
    if (lane < kSlots) init_barrier(own_arrived + 8 * lane, 1);
    show_barriers();
    order_before_copies();
    __syncwarp();
#pragma unroll 1
    for (int s = 0; s < kSlots; ++s) ask(s);
  } else if (warp == R::kProducers && lane < p.parts) {
    for (int row = 0; row < 2; ++row) {
      init_barrier(barrier(made_at, row, lane), 32 * tiles / p.parts);
      init_barrier(barrier(read_at, row, lane), 32 * consumers / p.parts);
    }
  }
  if constexpr (kScaled) {  // four pairs of a lane
    for (int i = threadIdx.x; i < p.cols / 8; i += R::kThreads) {
      uint32_t f[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int column = i >> 7 << 10 | (i >> 5 & 3) << 8 | w << 6 | R::loaded(i & 31);
        const float2 two = __ldg(reinterpret_cast<const float2*>(p.col_scale + column));
        f[w] = Pair<__nv_bfloat16>::pack(two.x, two.y);
      }
      factors[i] = make_uint4(f[0], f[1], f[2], f[3]);
    }
  }
  __syncthreads();

  if (warp < R::kProducers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R::kProducerRegisters));
    using P = Pair<__nv_bfloat16>;
    const Signs signs(relay_matrix());
    const SumMatrix sums = sum_matrix<RotateLayout<5, 0, true, false>>(10);
    const uint32_t* const from = slots + kSlotWords * kSlots * warp + R::loaded(lane) / 2;
    const int word = R::word(R::multiplied(lane)), log_part = p.parts > 1 ? kLogBlock : 31;
    int tile = warp, slot = 0;
    uint32_t phase = 0;
    for (int row = 0;; tile += R::kProducers) {
      if (tile >= tiles) tile -= tiles, ++row;
      if (row >= rows) break;
      wait_for_phase(own_arrived + 8 * slot, phase);
      uint32_t x[4][4];  // bits 9, 8 | 7, 6
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i >> 2][i & 3] = from[kSlotWords * slot + 32 * i];
      const auto free_slot = [&] {
        __syncwarp();
        ask(slot);
      };
      // With factors later: 1 to 3% faster, either way.
      if constexpr (!kScaled) free_slot();
      if constexpr (kScaled) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint4 y = multiply_pairs(make_uint4(x[k][0], x[k][1], x[k][2], x[k][3]),
                                         factors[R::kTile / 8 * tile + 32 * k + lane]);
          x[k][0] = y.x, x[k][1] = y.y, x[k][2] = y.z, x[k][3] = y.w;
        }
      }
      float v[8][4];  // bits 9, 8, 7 | 0, 1
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float first[4];
        P::mma(first, signs.plus, make_uint2(x[k][0], x[k][1]), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        const float4 sum = make_float4(first[0], first[1], first[2], first[3]);
        P::mma(v[2 * k], signs.plus, make_uint2(x[k][2], x[k][3]), sum);
        P::mma(v[2 * k + 1], signs.minus, make_uint2(x[k][2], x[k][3]), sum);
      }
      if constexpr (kScaled) free_slot();
      // Two at a time, for products that do not wait for each other.
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const QuadTerms even(v[i], v[i + 2], sums), odd(v[i + 1], v[i + 3], sums);
        even.begin(v[i], sums, 0), even.begin(v[i + 2], sums, 1);
        odd.begin(v[i + 1], sums, 0), odd.begin(v[i + 3], sums, 1);
        even.end(v[i], sums, 0), even.end(v[i + 2], sums, 1);
        odd.end(v[i + 1], sums, 0), odd.end(v[i + 3], sums, 1);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) butterfly(v[i >> 2][i & 3], v[4 | i >> 2][i & 3]);
      // Not before the products: the compiler would put off all of them.
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        asm volatile("" : "+f"(v[i][0]), "+f"(v[i][1]), "+f"(v[i][2]), "+f"(v[i][3]));
      }
      const int part = tile << 10 >> log_part, before = row - p.buffers;
      wait_for_phase(barrier(read_at, before, part), before >> 1 & 1);  // at once for the first rows
      float* const to = buffer(row) + R::kTile * tile + word;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        *reinterpret_cast<float4*>(to + 128 * i) = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
      }
      arrive(barrier(made_at, row, part));
      if (++slot == kSlots) slot = 0, phase ^= 1;
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R::kConsumerRegisters));
  // Registers of a consumer: the two lowest bits of the index, as they were stored, and the five highest of
  // the block.
  constexpr int kHighBit = kLogBlock - (R::kLogValues - 2), kTop = R::kLogValues - 1;
  const int group = (warp - R::kProducers) / consumers;
  if (group >= p.groups) return;
  const int share = warp - R::kProducers - group * consumers, thread = 32 * share + lane;
  const int index = (thread << 2 & ((1 << kHighBit) - 1)) | thread >> (kHighBit - 2) << kLogBlock;
  const int part = p.parts > 1 ? R::kShare * share >> kLogBlock : 0;
  const auto after = [](int i) { return i >> 2 << kHighBit; };
  int parity = 0;
  for (int row = group; row < rows; row += p.groups, parity ^= 1) {
    wait_for_phase(barrier(made_at, row, part), row >> 1 & 1);
    float v[R::kValues];
    const float* const from = buffer(row) + R::word(index);
#pragma unroll
    for (int i = 0; i < R::kValues; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + after(i));
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
    arrive(barrier(read_at, row, part));

    constexpr int kFirst = 2 + 10 - kHighBit;  // bit 10 of the index
    if constexpr (kFirst < kTop) butterfly_registers<kFirst>(v);
    if constexpr (kFirst + 1 < kTop) butterfly_registers<kFirst + 1>(v);
    if constexpr (kFirst + 2 < kTop) butterfly_registers<kFirst + 2>(v);
    if constexpr (kFirst + 3 < kTop) butterfly_registers<kFirst + 3>(v);
    uint32_t best[2] = {};
#pragma unroll
    for (int i = 0; i < R::kValues / 2; i += 2) {
      const auto size = [&](int k) { return __float_as_uint(fabsf(v[k]) + fabsf(v[k | 1 << kTop])); };
      best[i >> 1 & 1] = __vimax3_u32(best[i >> 1 & 1], size(i), size(i + 1));
    }
    uint32_t amax = __reduce_max_sync(0xffffffffu, max(best[0], best[1]));
    if (lane == 0) warp_amax[group][parity][share] = amax;
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(32 * consumers) : "memory");
    amax = __reduce_max_sync(0xffffffffu, lane < consumers ? warp_amax[group][parity][lane] : 0);
    amax = magnitude(__uint_as_float(amax) * p.norm);
    const float factor = p.norm * inverse_of(amax, p.qmax);

    const int64_t out_row = first_row + static_cast<int64_t>(row) * step;
    uint8_t* const q = p.q + out_row * p.cols + index;
    const auto store = [&](auto qtype) {
      constexpr QType kType = decltype(qtype)::value;
      butterfly_registers_scaled<kTop>(v, factor);
#pragma unroll
      for (int i = 0; i < R::kValues; i += 4) {
        *reinterpret_cast<uint32_t*>(q + after(i)) = round4<kType>(v[i], v[i + 2], v[i + 1], v[i + 3]);
      }
    };
    if (p.int8) {
      store(std::integral_constant<QType, QType::kInt8>{});
    } else {
      store(std::integral_constant<QType, QType::kE4M3>{});
    }
    if (thread == 0) p.scale[out_row] = scale_of(amax, p.qmax, p.inverse_qmax);
  }
#endif
}

namespace detail {

// Whether this GPU has a kernel with a body: an empty one has no shared memory of its own.
template <auto kKernel>
bool is_built(int device) {
  static std::atomic<int> known[kCachedDevices];  // 1 for no, 2 for yes
  int found = device < kCachedDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    found = attributes.sharedSizeBytes > 0 ? 2 : 1;
    if (device < kCachedDevices) known[device].store(found, std::memory_order_relaxed);
  }
  return found == 2;
}

template <bool kScaled, int kLogBlock>
cudaError_t launch_relay(RelayParams& p, int device, cudaStream_t stream) {
  constexpr auto kKernel = rotate_quantize_relay<kScaled, kLogBlock>;
  const size_t limit = shared_limit(device);
  if (!is_built<kKernel>(device) || Relay::bytes<kScaled>(p.cols, 1) > limit) return cudaErrorNotSupported;
  const int consumers = p.cols / Relay::kShare;
  p.groups = Relay::kConsumers / consumers >= 2 ? 2 : 1;
  p.buffers = Relay::bytes<kScaled>(p.cols, 2) <= limit ? 2 : 1;
  // Groups do not wait for each other, see the barriers.
  p.parts = p.groups == 1 ? p.cols >> kLogBlock : 1;
  const size_t shared = Relay::bytes<kScaled>(p.cols, p.buffers);
  int blocks = 0;
  const cudaError_t error = resident_blocks<kKernel>(device, consumers, Relay::kThreads, shared, blocks);
  if (error != cudaSuccess) return error;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(1 << kLogBlock)));
  kKernel<<<static_cast<unsigned>(std::min(p.rows, blocks)), Relay::kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

// cudaErrorNotSupported where rotate_quantize_kernel does it: rows of fewer than 16384 columns, of which
// several fit its registers, and those of 16384 and 32768 in blocks up to 8192, which leave none of its warps
// empty. Few rows take 1 us longer than there, but have the bits of many.
template <bool kScaled>
cudaError_t relay_rows(const __nv_bfloat16* x, int64_t stride, const float* col_scale, const RowsOutput& out,
                       int block, cudaStream_t stream) {
  if (out.cols < 4 * Relay::kShare || out.cols > Relay::kConsumers * Relay::kShare ||
      out.cols % Relay::kShare != 0 || out.rows > 1 << 30 || out.qtype == QType::kE5M2) {
    return cudaErrorNotSupported;
  }
  const bool fills = out.cols % (4 * Relay::kShare) == 0;
  if (fills && block <= 2 * Relay::kShare) return cudaErrorNotSupported;
  RelayParams p{};
  p.x = x;
  p.stride = stride;
  p.col_scale = col_scale;
  p.rows = static_cast<int>(out.rows);
  p.cols = static_cast<int>(out.cols);
  p.int8 = out.qtype == QType::kInt8;
  p.q = static_cast<uint8_t*>(out.q);
  p.scale = out.scale;
  p.qmax = p.int8 ? qmax<QType::kInt8>() : qmax<QType::kE4M3>();
  p.inverse_qmax = 1.0f / p.qmax;
  switch (block) {
    case 1 << 12:
      return launch_relay<kScaled, 12>(p, out.device, stream);
    case 1 << 13:
      return launch_relay<kScaled, 13>(p, out.device, stream);
    case 1 << 14:
      return launch_relay<kScaled, 14>(p, out.device, stream);
    case 1 << 15:
      return launch_relay<kScaled, 15>(p, out.device, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace detail

}  // namespace halo_train
