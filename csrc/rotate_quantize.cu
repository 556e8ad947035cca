// Rotate and round in one pass: rows of (x diag(col_scale)) H in 8 bits, one scale a row, read once and
// written once. A row stays in the registers of one thread block from its load to its rounding, so its
// largest magnitude costs no second look at memory. The rotation is that of hadamard_tile.cuh, the rounding
// that of round.cuh.

#include <cmath>

#include "hadamard_tile.cuh"
#include "quantize.h"
#include "quantize_common.cuh"

namespace halo_train {
namespace {

struct RotateParams {
  const __nv_bfloat16* x;
  int64_t rows, row_stride;
  int cols, warps;  // warps of a row
  const float* col_scale;
  uint8_t* q;
  float* scale;
  float norm;
};

constexpr int kLogTile = 11;  // elements of a warp: 64 values in each thread
constexpr int kThreads = 512;
constexpr int kMaxColumns = kThreads / 32 << kLogTile;

// Powers of two, so the products are exact in bfloat16 and the tensor cores can take them.
__device__ __forceinline__ void multiply(uint4& raw, const float* factors) {
  const float4 lo = __ldg(reinterpret_cast<const float4*>(factors));
  const float4 hi = __ldg(reinterpret_cast<const float4*>(factors) + 1);
  const auto product = [](uint32_t& word, float a, float b) {
    const __nv_bfloat162 result =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(word), __floats2bfloat162_rn(a, b));
    word = reinterpret_cast<const uint32_t&>(result);
  };
  product(raw.x, lo.x, lo.y);
  product(raw.y, lo.z, lo.w);
  product(raw.z, hi.x, hi.y);
  product(raw.w, hi.z, hi.w);
}

// A block of 2^(kLogTile + kLogWarps) lies over several warps, in its top bits. They trade places with the
// top bits of the register index: register g * kRest + r of warp w goes to warp g as its register w * kRest +
// r.
template <int kLogWarps>
__device__ __forceinline__ void exchange_warps(float (&v)[64], float* shared, int warp) {
  constexpr int kWarps = 1 << kLogWarps, kRest = 64 >> kLogWarps;
  const int lane = threadIdx.x & 31, mine = warp & (kWarps - 1);
  shared += (warp >> kLogWarps << (kLogTile + kLogWarps)) + lane;
#pragma unroll
  for (int g = 0; g < kWarps; ++g) {
    if (g == mine) continue;
#pragma unroll
    for (int r = 0; r < kRest; ++r) shared[((g * kWarps + mine) * kRest + r) * 32] = v[g * kRest + r];
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == mine) continue;
#pragma unroll
    for (int r = 0; r < kRest; ++r) v[w * kRest + r] = shared[((mine * kWarps + w) * kRest + r) * 32];
  }
}

// kLogN: bits of the block within a tile; kLogWarps: bits beyond. blockDim is (32 * warps of a row, rows).
template <QType kType, int kLogN, int kLogWarps>
__global__ void __launch_bounds__(kThreads) rotate_quantize_kernel(const RotateParams p) {
  static_assert(kLogWarps == 0 || kLogN == kLogTile, "a block over several warps fills their tiles");
  using L = HadamardLayout<__nv_bfloat16, kLogN, 6>;
  static_assert(L::kWarpBit == kLogTile && L::kTensor, "the layout that the addresses below assume");
  extern __shared__ float shared[];
  __shared__ uint32_t warp_amax[kThreads / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool valid = row < p.rows;

  const int in = (lane & 7) << L::kVectorBits | (lane >> 3) << L::kLaneBit | warp << kLogTile;
  const __nv_bfloat16* x = p.x + (valid ? row : 0) * p.row_stride + in;
  uint4 raw[1][L::kLoads];
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    raw[0][j] =
        in + (j << L::kLineBit) < p.cols ? detail::load16(x + (j << L::kLineBit)) : make_uint4(0, 0, 0, 0);
  }
  if (p.col_scale != nullptr) {
#pragma unroll
    for (int j = 0; j < L::kLoads; ++j) {
      if (in + (j << L::kLineBit) < p.cols) multiply(raw[0][j], p.col_scale + in + (j << L::kLineBit));
    }
  }
  uint32_t a[4];
  detail::sign_matrix<__nv_bfloat16>(a);
  float v[L::kValues];
  transform_tile<L>(raw, a, v, false, 0);
  if constexpr (kLogWarps > 0) {
    exchange_warps<kLogWarps>(v, shared + threadIdx.y * (p.warps << kLogTile), warp);
    detail::butterfly_registers<6 - kLogWarps>(v);
    if constexpr (kLogWarps > 1) detail::butterfly_registers<7 - kLogWarps>(v);
    if constexpr (kLogWarps > 2) detail::butterfly_registers<8 - kLogWarps>(v);
  }

  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) amax = max(amax, magnitude(v[i]));
  amax = __reduce_max_sync(0xffffffffu, amax);
  if (p.warps > 1) {
    const int first = threadIdx.y * p.warps;
    if (lane == 0) warp_amax[first + warp] = amax;
    __syncthreads();
    amax = __reduce_max_sync(0xffffffffu, lane < p.warps ? warp_amax[first + lane] : 0);
  }
  amax = magnitude(__uint_as_float(amax) * p.norm);
  if (!valid) return;
  if (threadIdx.x == 0) p.scale[row] = scale_of<kType>(amax);
  const float factor = p.norm * inverse_of<kType>(amax);

  // Registers, from the lowest bit: index bits 5, 0, 2, then kLineBit and up, with the top kLogWarps traded
  // for warp bits. Lanes: kLaneBit, kLaneBit + 1, 1, 3, 4. Lane bit 2 and register bit 0 are traded here, so
  // that a thread has eight neighbouring elements.
  constexpr int kLow = 3 - kLogWarps;  // bits of j that are still line bits
  const int mine = warp & ((1 << kLogWarps) - 1);
  const bool upper = lane & 4;
  const int out = (lane & 3) << L::kLaneBit | (lane >> 2 & 1) << 5 | (lane >> 3) << 3 |
                  mine << (L::kLaneBit - kLogWarps) | (warp - mine) << kLogTile;
  uint8_t* q = p.q + row * p.cols + out;
#pragma unroll
  for (int j = 0; j < L::kLoads; ++j) {
    const float* d = v + 8 * j;
    const uint32_t even = round4<kType>(d[0] * factor, d[2] * factor, d[4] * factor, d[6] * factor);
    const uint32_t odd = round4<kType>(d[1] * factor, d[3] * factor, d[5] * factor, d[7] * factor);
    const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? even : odd, 4);
    const uint32_t first = upper ? other : even, second = upper ? odd : other;
    const int offset = (j & ((1 << kLow) - 1)) << L::kLineBit | j >> kLow << kLogTile;
    const uint2 bytes = make_uint2(__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632));
    if (out + offset < p.cols) *reinterpret_cast<uint2*>(q + offset) = bytes;
  }
}

template <QType kType, int kLogN, int kLogWarps>
cudaError_t launch(const RotateParams& p, cudaStream_t stream) {
  constexpr auto kKernel = rotate_quantize_kernel<kType, kLogN, kLogWarps>;
  const int rows =
      std::max(1, 4 / p.warps);  // of a thread block: at least four warps, so that few are scheduled
  const size_t shared = kLogWarps > 0 ? sizeof(float) * rows * p.warps << kLogTile : 0;
  if (shared > 40 * 1024) {  // 48 KB with the static part are there without asking
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const int64_t grid = (p.rows + rows - 1) / rows;
  kKernel<<<static_cast<unsigned>(grid), dim3(32 * p.warps, rows), shared, stream>>>(p);
  return cudaGetLastError();
}

template <QType kType>
cudaError_t launch_sized(const RotateParams& p, int log_block, cudaStream_t stream) {
  switch (log_block) {
    case 6:
      return launch<kType, 6, 0>(p, stream);
    case 7:
      return launch<kType, 7, 0>(p, stream);
    case 8:
      return launch<kType, 8, 0>(p, stream);
    case 9:
      return launch<kType, 9, 0>(p, stream);
    case 10:
      return launch<kType, 10, 0>(p, stream);
    case 11:
      return launch<kType, 11, 0>(p, stream);
    case 12:
      return launch<kType, 11, 1>(p, stream);
    case 13:
      return launch<kType, 11, 2>(p, stream);
    case 14:
      return launch<kType, 11, 3>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool can_rotate_quantize(const QuantizeRowsArgs& a, int block) {
  // Other types and blocks take two passes: they are rare, and each would add its kernels to the library.
  return a.dtype == DType::kBFloat16 && a.qtype != QType::kE5M2 && a.cols <= kMaxColumns && block >= 64 &&
         block <= 16384 && detail::aligned(a.x) && a.row_stride % 8 == 0 && detail::aligned(a.q) &&
         (a.col_scale == nullptr || detail::aligned(a.col_scale));
}

cudaError_t rotate_quantize(const QuantizeRowsArgs& a, int block, cudaStream_t stream) {
  RotateParams p{};
  p.x = static_cast<const __nv_bfloat16*>(a.x);
  p.rows = a.rows;
  p.row_stride = a.row_stride;
  p.cols = static_cast<int>(a.cols);
  p.warps = (p.cols + (1 << kLogTile) - 1) >> kLogTile;
  p.col_scale = a.col_scale;
  p.q = static_cast<uint8_t*>(a.q);
  p.scale = a.scale;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  int log_block = 0;
  while (1 << log_block < block) ++log_block;
  return a.qtype == QType::kInt8 ? launch_sized<QType::kInt8>(p, log_block, stream)
                                 : launch_sized<QType::kE4M3>(p, log_block, stream);
}

}  // namespace halo_train
