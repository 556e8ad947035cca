// Activations of gated layers and their derivatives, in float32.

#pragma once

#include "quantize.h"

namespace halo_train {

namespace detail {

// 1 / (1 + 2^exponent), good to 2^-22.
__device__ __forceinline__ float sigmoid_of_power(float exponent) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

constexpr float kLog2E = 1.4426950408889634f;

}  // namespace detail

// x sigmoid(x).
struct SiluActivation {
  // act(x) factor
  __device__ __forceinline__ float value(float x, float factor) const {
    return x * factor * detail::sigmoid_of_power(-detail::kLog2E * x);
  }
  __device__ __forceinline__ void value_and_derivative(float x, float& value, float& derivative) const {
    const float s = detail::sigmoid_of_power(-detail::kLog2E * x);
    value = x * s;
    derivative = fmaf(value, 1.0f - s, s);
  }
};

// x sigmoid(a (x + b x^3)) = 0.5 x (1 + tanh(0.5 a (x + b x^3))).
struct GeluTanhActivation {
  static constexpr float kA = 1.5957691216057308f, kB = 0.044715f;  // a = 2 sqrt(2 / pi)

  static __device__ __forceinline__ float square(float x) { return fminf(x * x, 1e30f); }  // 0 inf is NaN
  static __device__ __forceinline__ float sigmoid(float x, float square) {
    return detail::sigmoid_of_power(x * fmaf(square, -detail::kLog2E * kA * kB, -detail::kLog2E * kA));
  }
  __device__ __forceinline__ float value(float x, float factor) const {
    return x * factor * sigmoid(x, square(x));
  }
  __device__ __forceinline__ void value_and_derivative(float x, float& value, float& derivative) const {
    const float x2 = square(x), s = sigmoid(x, x2);
    value = x * s;
    derivative = fmaf(value * (1.0f - s), fmaf(3.0f * kA * kB, x2, kA), s);
  }
};

// x Phi(x).
struct GeluActivation {
  static __device__ __forceinline__ float phi(float x) {
    return fmaf(0.5f, erff(x * 0.70710678118654752f), 0.5f);
  }
  __device__ __forceinline__ float value(float x, float factor) const { return x * factor * phi(x); }
  __device__ __forceinline__ void value_and_derivative(float x, float& value, float& derivative) const {
    constexpr float kInverseRoot = 0.39894228040143268f;  // 1 / sqrt(2 pi)
    const float p = phi(x);
    value = x * p;
    derivative = fmaf(x * kInverseRoot, __expf(-0.5f * x * x), p);
  }
};

// f(activation) for the one that is named.
template <typename F>
cudaError_t with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSilu:
      return f(SiluActivation{});
    case Activation::kGeluTanh:
      return f(GeluTanhActivation{});
    case Activation::kGelu:
      return f(GeluActivation{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace halo_train
