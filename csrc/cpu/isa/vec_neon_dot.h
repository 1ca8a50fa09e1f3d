// NEON with products of bytes (SDOT): queries of int8 and int4 caches are int16 that are split into
// two signed bytes each, so that K is multiplied as it is stored.
#pragma once

#include "vec_neon.h"

namespace gqa::cpu::GQA_ISA {

struct DotVec : NeonVec {
  // 16 numbers of q: their upper bytes in I::a, their lower ones in I::b. q = 256 * upper + lower.
  static constexpr bool kSplitsQueries = true;
  static constexpr bool kPairsKeys = false;

  static GQA_INLINE void store_queries(int16_t* p, F x0, F x1) {
    int8x16_t upper, lower;
    split(x0, x1, upper, lower);
    vst1q_s16(p, vreinterpretq_s16_s8(upper));
    vst1q_s16(p + 8, vreinterpretq_s16_s8(lower));
  }

  using NeonVec::load_int16;
  static GQA_INLINE void load_int16(const Int8* p, I& x0, I& x1) {
    x0 = of_bytes(vld1q_s8(&p->value));
    x1 = of_bytes(vld1q_s8(&p->value + 16));
  }
  static GQA_INLINE void load_int16(const Int4Pair* p, I& x0, I& x1) {
    int8x16_t even, odd;
    nibbles(vld1q_u8(&p->bits), even, odd);
    x0 = of_bytes(vzip1q_s8(even, odd));
    x1 = of_bytes(vzip2q_s8(even, odd));
  }

  using NeonVec::add_products;
  static GQA_INLINE void add_products(I& sum, I q, I k) {
    sum = {dot(sum.a, q.a, k.a), dot(sum.b, q.b, k.a)};
  }

  using NeonVec::store_sums2x2;
  using NeonVec::store_sums4;
  static GQA_INLINE void store_sums4(float* out, const I (&x)[4]) { vst1q_f32(out, sums4(x)); }
  static GQA_INLINE void store_sums2x2(float* p, float* q, const I (&x)[4]) {
    const float32x4_t sums = sums4(x);
    vst1_f32(p, vget_low_f32(sums));
    vst1_f32(q, vget_high_f32(sums));
  }

 protected:
  static GQA_INLINE void split(F x0, F x1, int8x16_t& upper, int8x16_t& lower) {
    const int16x8_t i0 = round_int16(x0), i1 = round_int16(x1), half = vdupq_n_s16(128);
    lower = vuzp1q_s8(vreinterpretq_s8_s16(i0), vreinterpretq_s8_s16(i1));
    upper = vcombine_s8(vshrn_n_s16(vaddq_s16(i0, half), 8), vshrn_n_s16(vaddq_s16(i1, half), 8));
  }
  static GQA_INLINE I of_bytes(int8x16_t x) {
    return {vreinterpretq_s16_s8(x), vreinterpretq_s16_s8(x)};
  }

 private:
  static GQA_INLINE int16x8_t dot(int16x8_t sum, int16x8_t x, int16x8_t y) {
    return vreinterpretq_s16_s32(
        vdotq_s32(vreinterpretq_s32_s16(sum), vreinterpretq_s8_s16(x), vreinterpretq_s8_s16(y)));
  }
  static GQA_INLINE float32x4_t sums4(const I (&x)[4]) {
    int32x4_t sums[4];
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      const int32x4_t upper = vshlq_n_s32(vreinterpretq_s32_s16(x[i].a), 8);
      sums[i] = vaddq_s32(upper, vreinterpretq_s32_s16(x[i].b));
    }
    return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
  }
};

#if !defined(GQA_EXTENDS_NEON_DOT)
using Vec = DotVec;
#endif

}  // namespace gqa::cpu::GQA_ISA
