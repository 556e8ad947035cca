// Where the rows of rotate_quantize_kernel.cuh come from: a matrix, a norm of one, or a gated activation of
// two. A source says what it reads (kInputs, Loader), what it keeps of its column vectors in shared memory
// (Factors), and makes of eight neighbouring inputs eight values, in float32 or as bfloat16 terms for the
// products.

#pragma once

#include <type_traits>

#include "activation.cuh"
#include "row_loader.cuh"

namespace halo_train {

namespace detail {

template <typename T>
__device__ __forceinline__ void unpack8(float (&v)[8], const uint4 (&raw)[sizeof(T) / 2]) {
  constexpr int kQuads = sizeof(T) / 2;
  const uint32_t words[8] = {raw[0].x,          raw[0].y,          raw[0].z,          raw[0].w,
                             raw[kQuads - 1].x, raw[kQuads - 1].y, raw[kQuads - 1].z, raw[kQuads - 1].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const float2 f = widen_pair<T>(words[i]);
      v[2 * i] = f.x, v[2 * i + 1] = f.y;
    } else {
      v[2 * i] = __uint_as_float(words[2 * i]), v[2 * i + 1] = __uint_as_float(words[2 * i + 1]);
    }
  }
}

// Eight elements of an aligned vector of any type, without a branch between the loads of several calls.
__device__ __forceinline__ void load8(float (&f)[8], const Vector& vector, int column, float missing) {
  const bool wide = vector.dtype == DType::kFloat32, half = vector.dtype == DType::kFloat16;
  const char* from = static_cast<const char*>(vector.data) + column * (wide ? 4 : 2);
  uint4 raw[2] = {};
  if (vector.data != nullptr) raw[0] = __ldg(reinterpret_cast<const uint4*>(from));
  if (vector.data != nullptr && wide) raw[1] = __ldg(reinterpret_cast<const uint4*>(from) + 1);
  float floats[8], bfloats[8], halves[8];
  unpack8<float>(floats, raw);
  unpack8<__nv_bfloat16>(bfloats, {raw[0]});
  unpack8<__half>(halves, {raw[0]});
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    f[i] = vector.data == nullptr ? missing : wide ? floats[i] : half ? halves[i] : bfloats[i];
  }
}

__device__ __forceinline__ void load8(float (&f)[8], const float* vector, int column, float missing) {
  float4 lo = make_float4(missing, missing, missing, missing), hi = lo;
  if (vector != nullptr) {
    lo = __ldg(reinterpret_cast<const float4*>(vector + column));
    hi = __ldg(reinterpret_cast<const float4*>(vector + column) + 1);
  }
  f[0] = lo.x, f[1] = lo.y, f[2] = lo.z, f[3] = lo.w, f[4] = hi.x, f[5] = hi.y, f[6] = hi.z, f[7] = hi.w;
}

// Four pairs of bfloat16 values, multiplied.
__device__ __forceinline__ uint4 multiply_pairs(const uint4& a, const uint4& b) {
  const auto one = [](uint32_t x, uint32_t y) {
    const __nv_bfloat162 p =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(x), reinterpret_cast<const __nv_bfloat162&>(y));
    return reinterpret_cast<const uint32_t&>(p);
  };
  return make_uint4(one(a.x, b.x), one(a.y, b.y), one(a.z, b.z), one(a.w, b.w));
}

// Eight factors of columns. Word and kWords: how shared memory holds them.
struct NoFactors {
  using Word = uint4;
  static constexpr int kWords = 0;
  Word word[1];
  uint32_t flip;  // signs of pairs of 16-bit operands, where there are no factors to carry them
};

// Powers of two: in bfloat16, or their exponents alone, where an exchange takes so much shared memory that
// there would be too little left for the loads under way.
template <bool kExponents>
struct PowerFactors {
  using Word = std::conditional_t<kExponents, uint2, uint4>;
  static constexpr int kWords = 1;
  Word word[1];

  __device__ __forceinline__ explicit PowerFactors(const float (&f)[8]) {
    if constexpr (kExponents) {
      // Where a pair of bfloat16 has them, those of the second pair in the gaps of the first one.
      const auto pair = [](float x, float y) {
        return (__float_as_uint(x) >> 16 & 0x7f80u) | (__float_as_uint(y) & 0x7f800000u);
      };
      const auto four = [&](const float* v) {
        const uint32_t second = pair(v[2], v[3]);
        return pair(v[0], v[1]) | __funnelshift_l(second, second, 8);
      };
      word[0] = make_uint2(four(f), four(f + 4));
    } else {
      using P = Pair<__nv_bfloat16>;
      word[0] =
          make_uint4(P::pack(f[0], f[1]), P::pack(f[2], f[3]), P::pack(f[4], f[5]), P::pack(f[6], f[7]));
    }
  }
  PowerFactors() = default;
  // Four pairs of bfloat16.
  __device__ __forceinline__ uint4 pairs() const {
    if constexpr (kExponents) {
      const auto first = [](uint32_t four) { return four & 0x7f807f80u; };
      const auto second = [&](uint32_t four) { return first(__funnelshift_r(four, four, 8)); };
      return make_uint4(first(word[0].x), second(word[0].x), first(word[0].y), second(word[0].y));
    } else {
      return word[0];
    }
  }
  __device__ __forceinline__ void multiply(float (&v)[8]) const {
    const uint4 p = pairs();
    const uint32_t pair[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = widen_pair<__nv_bfloat16>(pair[i]);
      v[2 * i] *= f.x, v[2 * i + 1] *= f.y;
    }
  }
};

// Any factors.
struct FloatFactors {
  using Word = uint4;
  static constexpr int kWords = 2;
  Word word[2];

  __device__ __forceinline__ explicit FloatFactors(const float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word[i] = make_uint4(__float_as_uint(f[4 * i]), __float_as_uint(f[4 * i + 1]),
                           __float_as_uint(f[4 * i + 2]), __float_as_uint(f[4 * i + 3]));
    }
  }
  FloatFactors() = default;
  __device__ __forceinline__ void multiply(float (&v)[8]) const {
    float f[8];
    unpack8<float>(f, word);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= f[i];
  }
};

// Factors as bfloat16, the same negated, and where they are not exact what is left to 2^-17.
template <bool kExact>
struct SignedFactors {
  using Word = uint4;
  static constexpr int kWords = kExact ? 2 : 3;
  Word word[3];

  __device__ __forceinline__ explicit SignedFactors(const float (&f)[8]) {
    Terms<2> terms;
    terms.split(f);
    const auto quad = [&](int t, uint32_t flip) {
      const uint32_t (&p)[4] = terms.pair[t];
      return make_uint4(p[0] ^ flip, p[1] ^ flip, p[2] ^ flip, p[3] ^ flip);
    };
    word[0] = quad(0, 0), word[1] = quad(0, 0x80008000u), word[2] = quad(1, 0);
  }
  SignedFactors() = default;
};

// Factors and what is added after them.
struct AffineFactors {
  using Word = uint4;
  static constexpr int kWords = 4;
  Word word[4];

  __device__ __forceinline__ AffineFactors(const float (&factor)[8], const float (&shift)[8]) {
    const FloatFactors factors(factor), shifts(shift);
    word[0] = factors.word[0], word[1] = factors.word[1];
    word[2] = shifts.word[0], word[3] = shifts.word[1];
  }
  AffineFactors() = default;
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// The warps that share a row, threadIdx.y of the thread block. kAlone: it is the only one.
template <bool kAlone>
struct RowGroup {
  int lane, warp, warps, group;  // of the lane, the warp in the row, the row in the thread block

  __device__ __forceinline__ explicit RowGroup(int warps_of_row)
      : lane(threadIdx.x & 31),
        warp(threadIdx.x >> 5),
        warps(warps_of_row),
        group(kAlone ? 0 : threadIdx.y) {}
  __device__ __forceinline__ void barrier() const {
    if constexpr (kAlone) {
      __syncthreads();
    } else if (warps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(32 * warps) : "memory");
    }
  }
  // Sum over the row, always in the same order. slots: one float for each warp of the row, read by nobody
  // since the last barrier but one.
  __device__ __forceinline__ float sum(float value, float* slots) const {
    value = warp_sum(value);
    if (warps == 1) return value;
    if (lane == 0) slots[warp] = value;
    barrier();
    return warp_sum(lane < warps ? slots[lane] : 0.0f);
  }
};

}  // namespace detail

// Sum of the squares of bfloat16 values that a warp has seen, by tensor cores: the diagonals of X X^T, half
// an operation an element. Exact products, float32 sums.
class SquareSum {
 public:
  // Eight values of each lane.
  __device__ __forceinline__ void add(const uint4& q) {
    add(low_, q.x, q.y, q.x);
    add(high_, q.x, q.y, q.y);
    add(low_, q.z, q.w, q.z);
    add(high_, q.z, q.w, q.w);
  }
  // A lane's share of the sum.
  __device__ __forceinline__ float share() const {
    const int row = (threadIdx.x & 31) >> 2, column = 2 * (threadIdx.x & 3);
    return row == column ? low_[0] + high_[2] : row == column + 1 ? low_[1] + high_[3] : 0.0f;
  }

 private:
  // Rows 0 to 7 of the product hold upper b^T, rows 8 to 15 lower b^T.
  static __device__ __forceinline__ void add(float (&d)[4], uint32_t upper, uint32_t lower, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(upper), "r"(lower), "r"(b));
  }
  float low_[4] = {}, high_[4] = {};
};

// What a source knows of a row.
struct RowState {
  SquareSum squares;  // of what this warp has seen, with Norm::kRms
  float mean = 0.0f, rstd = 1.0f;
};

enum class Norm { kNone, kRms, kLayer };

template <typename T_, bool kScaled>
struct PlainRows {
  using T = T_;
  static constexpr int kInputs = 1;
  static constexpr int kTerms = sizeof(T) == 4 ? 3 : std::is_same_v<T, __half> ? 2 : 1;
  static constexpr Norm kNorm = Norm::kNone;
  static constexpr bool kNegated = false;
  // Operands of products that come as they are have to be copied to where products take them: flipped on the
  // way, they cost nothing. Those that are multiplied by factors need no copies.
  static constexpr bool kFlips = kTerms == 1 && !kScaled;
  // The next row of 16-bit values in registers: shared memory belongs to the exchange.
  template <typename L>
  using Loader =
      std::conditional_t<sizeof(T) == 2, detail::RegisterLoader<T, L>, detail::SharedLoader<T, L, 1>>;
  template <bool kRotated, int kLogWarps>
  using Factors =
      std::conditional_t<kScaled, detail::PowerFactors<(kLogWarps > 1) || (sizeof(T) == 4 && kLogWarps == 1)>,
                         detail::NoFactors>;

  const T* x;
  int64_t stride;
  const float* col_scale;  // [cols] powers of two, or nullptr

  __device__ __forceinline__ void tiles(const T* (&tile)[1], int64_t row, int column) const {
    tile[0] = x + row * stride + column;
  }
  // Eight of col_scale.
  __device__ __forceinline__ void columns(float (&f)[8], int column) const {
    detail::load8(f, col_scale, column, 1.0f);
  }
  template <typename F>
  __device__ __forceinline__ F factors(int column, float sign) const {
    float f[8];
    columns(f, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] *= sign;
    return F(f);
  }
  template <typename F>
  __device__ __forceinline__ void terms(detail::Terms<kTerms>& t, const uint4 (&raw)[1][sizeof(T) / 2],
                                        const F& f, RowState&) const {
    if constexpr (kTerms == 1) {
      uint4 words = raw[0][0];
      if constexpr (kScaled) {
        words = detail::multiply_pairs(words, f.pairs());
      } else {
        words = make_uint4(words.x ^ f.flip, words.y ^ f.flip, words.z ^ f.flip, words.w ^ f.flip);
      }
      t.pair[0][0] = words.x, t.pair[0][1] = words.y, t.pair[0][2] = words.z, t.pair[0][3] = words.w;
    } else {
      float v[8];
      detail::unpack8<T>(v, raw[0]);
      if constexpr (kScaled) f.multiply(v);
      t.split(v);
    }
  }
};

// x weight: the row's rstd, which is known once the row has been read, multiplies the result. kExact: weight
// diag(col_scale) is of bfloat16.
template <typename T_, bool kExact>
struct RmsNormRows {
  using T = T_;
  static constexpr int kInputs = 1, kTerms = 2;
  static constexpr Norm kNorm = Norm::kRms;
  static constexpr bool kNegated = true;  // of the terms, the first
  static constexpr bool kFlips = false;
  template <typename L>
  using Loader = detail::SharedLoader<T, L, 1>;
  template <bool kRotated, int kLogWarps>
  using Factors = detail::SignedFactors<kExact>;

  const T* x;
  int64_t stride;
  Vector weight, bias;
  const float* col_scale;
  float eps;
  float *mean, *rstd;

  __device__ __forceinline__ void tiles(const T* (&tile)[1], int64_t row, int column) const {
    tile[0] = x + row * stride + column;
  }
  template <typename F>
  __device__ __forceinline__ F factors(int column, float sign) const {
    float w[8], d[8];
    detail::load8(w, weight, column, 1.0f);
    detail::load8(d, col_scale, column, 1.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] *= d[i] * sign;
    return F(w);
  }
  // Products of two bfloat16 values are exact in two terms, the second an exact remainder. The first is
  // negative, because a remainder wants it so.
  __device__ __forceinline__ void terms(detail::Terms<2>& t, const uint4 (&raw)[1][1],
                                        const detail::SignedFactors<kExact>& f, RowState& row) const {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "the remainder of other types is not exact");
    row.squares.add(raw[0][0]);
    const auto pair = [](const uint4& quad, int i) {
      const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
      return reinterpret_cast<const __nv_bfloat162&>(words[i]);
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 x2 = pair(raw[0][0], i);
      const __nv_bfloat162 first = __hmul2_rn(x2, pair(f.word[1], i));
      __nv_bfloat162 rest = __hfma2(x2, pair(f.word[0], i), first);
      if constexpr (!kExact) rest = __hfma2(x2, pair(f.word[2], i), rest);
      t.pair[0][i] = reinterpret_cast<const uint32_t&>(first);
      t.pair[1][i] = reinterpret_cast<const uint32_t&>(rest);
    }
  }
  __device__ __forceinline__ void values(float (&v)[8], const uint4 (&raw)[1][1],
                                         const detail::SignedFactors<kExact>& f, RowState& row) const {
    row.squares.add(raw[0][0]);
    detail::unpack8<T>(v, raw[0]);
    float high[8], low[8];
    detail::unpack8<__nv_bfloat16>(high, {f.word[0]});
    if constexpr (!kExact) detail::unpack8<__nv_bfloat16>(low, {f.word[2]});
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= kExact ? high[i] : high[i] + low[i];
  }
};

// (x - mean) rstd weight + bias; the statistics need passes over the row of their own, in shared memory.
template <typename T_>
struct LayerNormRows : RmsNormRows<T_, false> {
  using T = T_;
  static constexpr Norm kNorm = Norm::kLayer;
  static constexpr bool kNegated = false;
  template <bool kRotated, int kLogWarps>
  using Factors = detail::AffineFactors;

  template <typename F>
  __device__ __forceinline__ F factors(int column, float sign) const {
    float w[8], b[8], d[8];
    detail::load8(w, this->weight, column, 1.0f);
    detail::load8(b, this->bias, column, 0.0f);
    detail::load8(d, this->col_scale, column, 1.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] *= d[i] * sign, b[i] *= d[i] * sign;
    return F(w, b);
  }
  template <typename Loader>
  __device__ __forceinline__ void statistics(RowState& row, const Loader& loader, int stage, int loads,
                                             int cols, const detail::RowGroup<false>& group, float* sums,
                                             float* squares) const {
    float v[8], total = 0.0f;
    uint4 raw[1][1];
    for (int j = 0; j < loads; ++j) {
      loader.read(raw, stage, j);  // zeros beyond the row
      detail::unpack8<T>(v, raw[0]);
#pragma unroll
      for (int i = 0; i < 8; ++i) total += v[i];
    }
    row.mean = group.sum(total, sums) / cols;
    total = 0.0f;
    for (int j = 0; j < loads; ++j) {
      if (!loader.inside(j)) continue;
      loader.read(raw, stage, j);
      detail::unpack8<T>(v, raw[0]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float difference = v[i] - row.mean;
        total = fmaf(difference, difference, total);
      }
    }
    row.rstd = rsqrtf(group.sum(total, squares) / cols + this->eps);
  }
  __device__ __forceinline__ void values(float (&v)[8], const uint4 (&raw)[1][1],
                                         const detail::AffineFactors& f, const RowState& row) const {
    detail::unpack8<T>(v, raw[0]);
    float w[8], b[8];
    detail::unpack8<float>(w, {f.word[0], f.word[1]});
    detail::unpack8<float>(b, {f.word[2], f.word[3]});
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - row.mean) * row.rstd, w[i], b[i]);
  }
  __device__ __forceinline__ void terms(detail::Terms<2>& t, const uint4 (&raw)[1][1],
                                        const detail::AffineFactors& f, const RowState& row) const {
    float v[8];
    values(v, raw, f, row);
    t.split(v);
  }
};

// act(gate) up.
template <typename T_, typename Act>
struct GatedRows {
  using T = T_;
  static constexpr int kInputs = 2, kTerms = 2;
  static constexpr Norm kNorm = Norm::kNone;
  static constexpr bool kNegated = false, kFlips = false;
  template <typename L>
  using Loader = detail::SharedLoader<T, L, 2>;
  template <bool kRotated, int kLogWarps>
  using Factors = std::conditional_t<kRotated, detail::PowerFactors<(kLogWarps > 0)>, detail::FloatFactors>;

  const T *gate, *up;
  int64_t gate_stride, up_stride;
  const float* col_scale;
  Act activation;

  __device__ __forceinline__ void tiles(const T* (&tile)[2], int64_t row, int column) const {
    tile[0] = gate + row * gate_stride + column;
    tile[1] = up + row * up_stride + column;
  }
  template <typename F>
  __device__ __forceinline__ F factors(int column, float sign) const {
    float f[8];
    detail::load8(f, col_scale, column, 1.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] *= sign;
    return F(f);
  }
  template <typename F>
  __device__ __forceinline__ void values(float (&v)[8], const uint4 (&raw)[2][1], const F& f,
                                         RowState&) const {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "powers of two multiply pairs of bfloat16");
    float g[8];
    detail::unpack8<T>(g, raw[0]);
    if constexpr (std::is_same_v<F, detail::FloatFactors>) {
      detail::unpack8<T>(v, raw[1]);
      f.multiply(v);
    } else {
      detail::unpack8<T>(v, {detail::multiply_pairs(raw[1][0], f.pairs())});
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = activation.value(g[i], v[i]);
  }
  template <typename F>
  __device__ __forceinline__ void terms(detail::Terms<2>& t, const uint4 (&raw)[2][1], const F& f,
                                        RowState& row) const {
    float v[8];
    values(v, raw, f, row);
    t.split(v);
  }
};

}  // namespace halo_train
