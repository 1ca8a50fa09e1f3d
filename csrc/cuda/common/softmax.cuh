// Softmax in base 2: exp(x) = 2^(x * log2(e)), with log2(e) folded into the scale.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace gqa::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

// The shift of exponents: the row's maximum, or 0 if that is -inf (no key seen yet), so that
// 2^(-inf - shift) is 0 and not NaN.
__device__ __forceinline__ float softmax_shift(float maximum) {
  return maximum == minus_infinity() ? 0.0f : maximum;
}

// Adds a sink, which is a further logit without a value (in natural units), to a row's sum of
// 2^(score - shift). Returns the factor by which the row's unnormalised output must be multiplied.
// Does nothing to a row that sees no key.
__device__ __forceinline__ float add_sink(float sink, float& shift, float& sum) {
  if (sum == 0.0f) return 1.0f;
  const float logit = sink * kLog2e;
  const float larger = fmaxf(shift, logit);
  const float factor = exp2_approx(shift - larger);
  sum = sum * factor + exp2_approx(logit - larger);
  shift = larger;
  return factor;
}

// tanh to a few ulp. Near 0, where 1 - 2 / (e^2x + 1) cancels, its series is used.
__device__ __forceinline__ float tanh_fast(float x) {
  const float e = exp2_approx(fabsf(x) * (2.0f * kLog2e));
  const float far = copysignf(1.0f - __fdividef(2.0f, e + 1.0f), x);
  const float x2 = x * x;
  const float series =
      fmaf(x2, fmaf(x2, fmaf(x2, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3);
  return fabsf(x) < 0.25f ? fmaf(x * x2, series, x) : far;
}

}  // namespace gqa::cuda
