// Activations of gated layers and their derivatives, in float32.

#pragma once

#include "quantize.h"

namespace halo_train {

namespace detail {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace detail

// x sigmoid(linear x + cubic x^3): silu, and gelu with tanh, since 0.5 (1 + tanh u) = sigmoid(2 u). The two
// approximations are good to 2^-22.
struct SigmoidActivation {
  float linear, cubic;

  static SigmoidActivation of(Activation activation) {
    constexpr float kTwiceRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    return activation == Activation::kSilu ? SigmoidActivation{1.0f, 0.0f}
                                           : SigmoidActivation{kTwiceRoot, 0.044715f * kTwiceRoot};
  }
  static __device__ __forceinline__ float square(float x) { return fminf(x * x, 1e30f); }  // 0 inf is NaN
  __device__ __forceinline__ float sigmoid(float x, float square) const {
    constexpr float kLog2E = 1.4426950408889634f;
    const float exponent = x * fmaf(square, -kLog2E * cubic, -kLog2E * linear);
    return detail::reciprocal_approximate(1.0f + detail::exp2_approximate(exponent));
  }
  __device__ __forceinline__ float value(float x) const { return x * sigmoid(x, square(x)); }
  __device__ __forceinline__ void value_and_derivative(float x, float& value, float& derivative) const {
    const float x2 = square(x), s = sigmoid(x, x2);
    value = x * s;
    derivative = fmaf(value * (1.0f - s), fmaf(3.0f * cubic, x2, linear), s);
  }
};

// x Phi(x).
struct ErfActivation {
  static ErfActivation of(Activation) { return {}; }
  static __device__ __forceinline__ float phi(float x) {
    return fmaf(0.5f, erff(x * 0.70710678118654752f), 0.5f);
  }
  __device__ __forceinline__ float value(float x) const { return x * phi(x); }
  __device__ __forceinline__ void value_and_derivative(float x, float& value, float& derivative) const {
    constexpr float kHalfLog2E = 0.72134752044448170f, kInverseRoot = 0.39894228040143268f;  // 1 / sqrt(2 pi)
    const float p = phi(x);
    value = x * p;
    derivative = fmaf(x * kInverseRoot, detail::exp2_approximate(-kHalfLog2E * x * x), p);
  }
};

}  // namespace halo_train
