// Vectors of 4 floats in the compiler's own vector types: SSE2 on x86-64, NEON on aarch64, scalars
// elsewhere. This is the interface that every instruction set implements. The kernels use nothing
// else of the processor.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#include "../../core/params.h"
#include "isa.h"
#include "scalars.h"

namespace gqa::cpu::GQA_ISA {

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  using Mask = I;
  static constexpr int kWidth = 4;
  static constexpr int kSums = 12;  // that fit in registers together with their operands

  static GQA_INLINE F set1(float x) { return F{x, x, x, x}; }
  static GQA_INLINE F iota() { return F{0, 1, 2, 3}; }

  // Loads widen to fp32 exactly (dequantize.h: Float8E4M3 to a kLoadedPart of the value, Int4Pair
  // less its kLoadedZero); stores round to nearest even.
  static GQA_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  template <class T>
  static GQA_INLINE F load(const T* p) {
    return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  static GQA_INLINE F load(const Int4Pair* p) {
    return F{static_cast<float>((p[0].bits & 15) - 8), static_cast<float>((p[0].bits >> 4) - 8),
             static_cast<float>((p[1].bits & 15) - 8), static_cast<float>((p[1].bits >> 4) - 8)};
  }

  // Whether the set has masked loads: load_first(p, n), the first n (< kWidth) numbers at p, then
  // zeros; and load_block_first(p, n, x0, x1), the same for a block. They touch no memory beyond.
  template <class S>
  static constexpr bool kMasks = false;

  // Whether the set has products of 16-bit integers, as products_int16.h uses them:
  //   I                        2 * kWidth int16, or kWidth sums of 32 bits
  //   load_int16(p, x0, x1)    4 * kWidth int8 or int4 numbers; of int4 even and odd ones apart
  //   load_pairs(a, b, x0, x1) pairs (a[i], b[i]) of 2 * kWidth numbers, likewise
  //   set_pair(p)              a pair of int16, repeated or of a type of its own
  //   add_products(sum, a, b)  sum[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1], or of other two
  //                            numbers, if load_pairs and set_pair place pairs likewise
  //   store_int16(p, x)        kWidth floats, rounded to nearest
  static constexpr bool kHasInt16 = false;

  // Whether load_block takes BitShiftedFp8 fp8 numbers, which it splits, and there are
  //   max_negative(most, p)    most = max(most, bytes at p | 0x80), 4 * kWidth unsigned bytes
  //   any_byte_from(limit, x)  whether a byte of x is at least `limit`
  static constexpr bool kShiftsFp8 = false;

  // Whether load_block returns the even numbers in x0 and the odd ones in x1.
  template <class S>
  static constexpr bool kDeinterleaves = false;
  // 2 * kWidth numbers.
  template <class S>
  static GQA_INLINE void load_block(const S* p, F& x0, F& x1) {
    x0 = load(p);
    x1 = load(p + kWidth / kNumbersPerElement<S>);
  }
  // The first or the second vector of load_block.
  template <int kPart, class S>
  static GQA_INLINE F load_part(const S* p) {
    return load(p + kPart * kWidth / kNumbersPerElement<S>);
  }
  // Permutes 2 * kWidth numbers to the even and the odd ones, and back.
  static GQA_INLINE void deinterleave(F& x0, F& x1) {
    const F a = x0, b = x1;
    x0 = F{a[0], a[2], b[0], b[2]};
    x1 = F{a[1], a[3], b[1], b[3]};
  }
  static GQA_INLINE void interleave(F& even, F& odd) {
    const F a = even, b = odd;
    even = F{a[0], b[0], a[1], b[1]};
    odd = F{a[2], b[2], a[3], b[3]};
  }
  // Forces x into a register from here to its uses.
  static GQA_INLINE void pin(F&) {}

  static GQA_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static GQA_INLINE void store(BFloat16* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = to_bfloat16(x[i]);
  }
  static GQA_INLINE void store(Float16* p, F x) {
    for (int i = 0; i < kWidth; ++i) p[i] = to_float16(x[i]);
  }
  // x rounded to T and widened again.
  template <class T>
  static GQA_INLINE F round_to(F x, const T*) {
    T rounded[kWidth];
    store(rounded, x);
    return load(rounded);
  }

  static GQA_INLINE F add(F a, F b) { return a + b; }
  static GQA_INLINE F sub(F a, F b) { return a - b; }
  static GQA_INLINE F mul(F a, F b) { return a * b; }
  static GQA_INLINE F div(F a, F b) { return a / b; }
#if defined(__aarch64__)
  static GQA_INLINE F fma(F a, F b, F c) {
    return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
#else
  static GQA_INLINE F fma(F a, F b, F c) { return a * b + c; }
#endif
  // b where either is NaN.
  static GQA_INLINE F max(F a, F b) { return select(a > b, a, b); }
  static GQA_INLINE F abs(F x) { return (F)((I)x & I{kAbs, kAbs, kAbs, kAbs}); }
  static GQA_INLINE F copy_sign(F magnitude, F sign) {
    return (F)((I)abs(magnitude) | ((I)sign & ~I{kAbs, kAbs, kAbs, kAbs}));
  }

  static GQA_INLINE Mask less(F a, F b) { return a < b; }
  static GQA_INLINE Mask equal(F a, F b) { return a == b; }
  static GQA_INLINE Mask both(Mask a, Mask b) { return a & b; }
  static GQA_INLINE F select(Mask mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }

  // x * 2^n for the integer n in the low bits of `n_bits`; 2^-127 * 1 gives 0.
  static GQA_INLINE F add_to_exponent(F x, F n_bits) { return (F)((I)x + ((I)n_bits << 23)); }

  static GQA_INLINE float reduce_add(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static GQA_INLINE float reduce_max(F x) {
    const float a = x[0] > x[1] ? x[0] : x[1];
    const float b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  // out[i] = sum of the lanes of x[i]
  static GQA_INLINE void store_sums4(float* out, const F (&x)[4]) {
    F t[4] = {x[0], x[1], x[2], x[3]};
    transpose(t);
    store(out, (t[0] + t[1]) + (t[2] + t[3]));
  }
  // a[0..1], b[0..1] = sums of the lanes of x[0..1], x[2..3]
  static GQA_INLINE void store_sums2x2(float* a, float* b, const F (&x)[4]) {
    float sums[4];
    store_sums4(sums, x);
    std::memcpy(a, sums, 2 * sizeof(float));
    std::memcpy(b, sums + 2, 2 * sizeof(float));
  }
  static GQA_INLINE void transpose(F (&x)[kWidth]) {
    const F a = x[0], b = x[1], c = x[2], d = x[3];
    x[0] = F{a[0], b[0], c[0], d[0]};
    x[1] = F{a[1], b[1], c[1], d[1]};
    x[2] = F{a[2], b[2], c[2], d[2]};
    x[3] = F{a[3], b[3], c[3], d[3]};
  }

 private:
  static constexpr int32_t kAbs = 0x7fffffff;
};

}  // namespace gqa::cpu::GQA_ISA
