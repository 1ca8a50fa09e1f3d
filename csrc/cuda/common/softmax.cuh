// Online softmax in base 2: exp(x) = 2^(x * log2(e)), with log2(e) folded into the scale.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace gqa::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// tanh with an error of a few ulp: 1 - 2 / (2^(2 x log2 e) + 1), whose ends are exact.
__device__ __forceinline__ float tanh_fast(float x) {
  const float e = exp2_approx(fabsf(x) * (2 * kLog2e));
  const float y = 1.0f - __fdividef(2.0f, e + 1.0f);
  // Near 0 the difference cancels; the series is exact to fp32 there.
  const float x2 = x * x;
  const float small = x + x * x2 * (-1.0f / 3 + x2 * (2.0f / 15));
  return fabsf(x) < 0.05f ? small : copysignf(y, x);
}

}  // namespace gqa::cuda
