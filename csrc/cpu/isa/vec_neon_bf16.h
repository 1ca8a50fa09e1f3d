// NEON with products of bf16 pairs (BFDOT), for products_halves.h, and of 2 x 8 by 8 x 2 matrices of
// bytes (SMMLA).
//
// BFDOT rounds each sum to odd, and takes subnormal numbers for 0 (Arm Architecture Reference Manual,
// BFDotAdd).
#pragma once

#define GQA_EXTENDS_NEON_DOT
#include "vec_neon_dot.h"

namespace gqa::cpu::GQA_ISA {

struct Vec : DotVec {
  struct Halves {  // 16 numbers, or 8 pairs
    bfloat16x8_t a, b;
  };
  using Weights = bfloat16x4_t;

  static GQA_INLINE Halves load_halves(const BFloat16* p) {
    return {vreinterpretq_bf16_u16(vld1q_u16(&p->bits)),
            vreinterpretq_bf16_u16(vld1q_u16(&p->bits + 8))};
  }
  static GQA_INLINE void add_products(F& sum, Halves x, Halves y) {
    sum = {vbfdotq_f32(sum.a, x.a, y.a), vbfdotq_f32(sum.b, x.b, y.b)};
  }

  static GQA_INLINE Weights load_weights(const BFloat16* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return vreinterpret_bf16_u32(vdup_n_u32(bits));
  }
  // Pairs of two rows: columns 0 to 7, and 8 to 15.
  static GQA_INLINE void load_columns(const BFloat16* a, const BFloat16* b, Halves& x0,
                                      Halves& x1) {
    x0 = zip(vld1q_u16(&a->bits), vld1q_u16(&b->bits));
    x1 = zip(vld1q_u16(&a->bits + 8), vld1q_u16(&b->bits + 8));
  }
  static GQA_INLINE void order_columns(float*) {}
  static GQA_INLINE void add_columns(F& sum0, F& sum1, Weights w, Halves x0, Halves x1) {
    sum0 = {vbfdotq_lane_f32(sum0.a, x0.a, w, 0), vbfdotq_lane_f32(sum0.b, x0.b, w, 0)};
    sum1 = {vbfdotq_lane_f32(sum1.a, x1.a, w, 0), vbfdotq_lane_f32(sum1.b, x1.b, w, 0)};
  }

  // A matrix of q has the upper and the lower bytes of 8 numbers, one of K has 8 numbers of two
  // keys. Sums are upper . first key, upper . second key, lower . first, lower . second.
  static constexpr bool kPairsKeys = true;
  static GQA_INLINE void store_queries(int16_t* p, F x0, F x1) {
    int8x16_t upper, lower;
    split(x0, x1, upper, lower);
    const int64x2_t a = vreinterpretq_s64_s8(upper), b = vreinterpretq_s64_s8(lower);
    vst1q_s16(p, vreinterpretq_s16_s64(vzip1q_s64(a, b)));
    vst1q_s16(p + 8, vreinterpretq_s16_s64(vzip2q_s64(a, b)));
  }
  static GQA_INLINE I pair_keys(I x, I y) {
    const int64x2_t a = vreinterpretq_s64_s16(x.a), b = vreinterpretq_s64_s16(y.a);
    return {vreinterpretq_s16_s64(vzip1q_s64(a, b)), vreinterpretq_s16_s64(vzip2q_s64(a, b))};
  }
  using DotVec::add_products;
  static GQA_INLINE void add_products(I& sum, I q, I k) {
    sum = {multiply(sum.a, q.a, k.a), multiply(sum.b, q.b, k.b)};
  }
  static GQA_INLINE void store_pair_sums(float* out, I x) {
    const int32x4_t sums = vaddq_s32(vreinterpretq_s32_s16(x.a), vreinterpretq_s32_s16(x.b));
    vst1_f32(out, vcvt_f32_s32(vadd_s32(vshl_n_s32(vget_low_s32(sums), 8), vget_high_s32(sums))));
  }

 private:
  static GQA_INLINE Halves zip(uint16x8_t a, uint16x8_t b) {
    return {vreinterpretq_bf16_u16(vzip1q_u16(a, b)), vreinterpretq_bf16_u16(vzip2q_u16(a, b))};
  }
  static GQA_INLINE int16x8_t multiply(int16x8_t sum, int16x8_t x, int16x8_t y) {
    return vreinterpretq_s16_s32(
        vmmlaq_s32(vreinterpretq_s32_s16(sum), vreinterpretq_s8_s16(x), vreinterpretq_s8_s16(y)));
  }
};

}  // namespace gqa::cpu::GQA_ISA
