// exp2, tanh and partial vectors on any instruction set's Vec.
#pragma once

#include <cmath>
#include <cstring>

#include "../../core/params.h"
#include "isa.h"

namespace gqa::cpu::GQA_ISA {

constexpr float kLog2E = 1.44269504f;

// 2^x for x < 128, within 1.2 ulp; 0 for x <= -127; NaN stays NaN.
template <class V>
GQA_INLINE typename V::F exp2(typename V::F x) {
  // Adding 1.5 * 2^23 leaves the nearest integer to x in the low bits.
  const typename V::F magic = V::set1(12582912.0f);
  x = V::max(V::set1(-127.0f), x);
  const typename V::F shifted = V::add(x, magic);
  const typename V::F fraction = V::sub(x, V::sub(shifted, magic));  // [-0.5, 0.5]
  // Minimax polynomial of 2^f with the constant term 1: relative error 2e-9.
  typename V::F p = V::set1(1.5353362e-4f);
  p = V::fma(p, fraction, V::set1(1.3398875e-3f));
  p = V::fma(p, fraction, V::set1(9.61843692e-3f));
  p = V::fma(p, fraction, V::set1(5.55033237e-2f));
  p = V::fma(p, fraction, V::set1(2.40226477e-1f));
  p = V::fma(p, fraction, V::set1(6.93147182e-1f));
  p = V::fma(p, fraction, V::set1(1.0f));
  // Adding to the exponent can turn a NaN into a number. The product is 0, or NaN for NaN.
  return V::fma(fraction, V::set1(0.0f), V::add_to_exponent(p, shifted));
}

// tanh(x), within 2 ulp.
template <class V>
GQA_INLINE typename V::F tanh(typename V::F x) {
  const typename V::F one = V::set1(1.0f);
  const typename V::F magnitude = V::abs(x);
  // |x| >= 0.625: 1 - 2 / (e^2|x| + 1). From 10 on it is 1 in fp32; the bound keeps 2^x in range.
  const typename V::F bounded =
      V::sub(V::set1(0.0f), V::max(V::set1(-10.0f), V::sub(V::set1(0.0f), magnitude)));
  const typename V::F e = exp2<V>(V::mul(bounded, V::set1(2.0f * kLog2E)));
  const typename V::F large = V::sub(one, V::div(V::set1(2.0f), V::add(e, one)));
  // |x| < 0.625: odd minimax polynomial, relative error 4e-9.
  const typename V::F z = V::mul(x, x);
  typename V::F p = V::set1(-5.70491096e-3f);
  p = V::fma(p, z, V::set1(2.06390228e-2f));
  p = V::fma(p, z, V::set1(-5.37396967e-2f));
  p = V::fma(p, z, V::set1(1.33314416e-1f));
  p = V::fma(p, z, V::set1(-3.33332807e-1f));
  const typename V::F small = V::fma(V::mul(p, z), x, x);
  return V::select(V::less(magnitude, V::set1(0.625f)), small, V::copy_sign(large, x));
}

// The derivative of tanh, 1 - tanh(x)^2, without the cancellation of that form: 4 e / (e + 1)^2
// with e = exp(2 |x|).
template <class V>
GQA_INLINE typename V::F tanh_derivative(typename V::F x) {
  // Beyond 20 it is below 2e-17; the bound keeps (e + 1)^2 in range.
  const typename V::F zero = V::set1(0.0f);
  const typename V::F minus = V::max(V::set1(-20.0f), V::sub(zero, V::abs(x)));
  const typename V::F e = exp2<V>(V::mul(minus, V::set1(-2.0f * kLog2E)));
  const typename V::F sum = V::add(e, V::set1(1.0f));
  return V::div(V::mul(V::set1(4.0f), e), V::mul(sum, sum));
}

// The first n (< kWidth) numbers at p, then zeros. Reads nothing beyond them.
template <class V, class T>
inline typename V::F load_partial(const T* p, int64_t n) {
  if constexpr (V::template kMasks<T>) {
    return V::load_first(p, n);
  } else {
    T lanes[V::kWidth / kNumbersPerElement<T>] = {};
    std::memcpy(lanes, p, n * sizeof(T) / kNumbersPerElement<T>);
    return V::load(lanes);
  }
}

template <class V, class T>
inline void store_partial(T* p, typename V::F x, int64_t n) {
  T lanes[V::kWidth];
  V::store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// n elements of T at `from`, widened to fp32 at `to`.
template <class V, class T>
inline void widen_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) V::store(to + i, V::load(from + i));
  if (i < n) store_partial<V>(to + i, load_partial<V>(from + i, n - i), n - i);
}

}  // namespace gqa::cpu::GQA_ISA
