// Vectors of 8 floats in two registers of NEON. Six rows of two such vectors are 24 of aarch64's 32
// registers, so the kernels of 8 lanes fit. The interface is described in vec_portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../../core/params.h"
#include "isa.h"
#include "scalars.h"

namespace gqa::cpu::GQA_ISA {

struct NeonVec {
  struct F {
    float32x4_t a, b;
  };
  struct Mask {
    uint32x4_t a, b;
  };
  struct I {  // 16 int16; or 8 sums of 32 bits, as their bits
    int16x8_t a, b;
  };
  static constexpr int kWidth = 8;
  static constexpr int kSums = 12;  // that fit in registers together with their operands

  static GQA_INLINE F set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static GQA_INLINE F iota() {
    constexpr float kLanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    return load(kLanes);
  }

  static GQA_INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static GQA_INLINE F load(const BFloat16* p) {
    const uint16x8_t bits = vld1q_u16(&p->bits), zero = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(zero, bits)),
            vreinterpretq_f32_u16(vzip2q_u16(zero, bits))};
  }
  static GQA_INLINE F load(const Float16* p) { return widen(vld1q_u16(&p->bits)); }
  static GQA_INLINE F load(const Float8E4M3* p) {
    // Sign-extended e4m3 to fp16 of 1/256 of the value: the exponents' biases differ by 8, and so
    // subnormals stay exact.
    const uint16x8_t x = vreinterpretq_u16_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(&p->bits))));
    const uint16x8_t ones = vdupq_n_u16(0x7f);
    const uint16x8_t nan = vceqq_u16(vandq_u16(x, ones), ones);
    return widen(vorrq_u16(vandq_u16(vshlq_n_u16(x, 7), vdupq_n_u16(0xbf80)), nan));
  }
  static GQA_INLINE F load(const Float8E5M2* p) {
    return widen(vshlq_n_u16(vmovl_u8(vld1_u8(&p->bits)), 8));
  }
  static GQA_INLINE F load(const Int8* p) { return widen(vld1_s8(&p->value)); }
  static GQA_INLINE F load(const Int4Pair* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    const uint8x8_t pairs = vreinterpret_u8_u32(vdup_n_u32(bits));
    const uint8x8_t numbers = vzip1_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
    return widen(vsub_s8(vreinterpret_s8_u8(numbers), vdup_n_s8(8)));
  }

  template <class S>
  static constexpr bool kMasks = false;
  static constexpr bool kHasInt16 = true;
  static constexpr bool kSplitsQueries = false;
  static GQA_INLINE I zero_integers() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
  static GQA_INLINE I load_int16(const int16_t* p) { return {vld1q_s16(p), vld1q_s16(p + 8)}; }
  static GQA_INLINE void load_int16(const Int8* p, I& x0, I& x1) {
    x0 = widen_bytes(vld1q_s8(&p->value));
    x1 = widen_bytes(vld1q_s8(&p->value + 16));
  }
  static GQA_INLINE void load_int16(const Int4Pair* p, I& x0, I& x1) {
    int8x16_t even, odd;
    nibbles(vld1q_u8(&p->bits), even, odd);
    x0 = widen_bytes(vzip1q_s8(even, odd));
    x1 = widen_bytes(vzip2q_s8(even, odd));
  }
  // Pairs of 4 columns lie in one register: those of row a in its lower half, those of b above.
  static GQA_INLINE void load_pairs(const Int8* a, const Int8* b, I& x0, I& x1) {
    const int32x4_t row_a = vreinterpretq_s32_s8(vld1q_s8(&a->value));
    const int32x4_t row_b = vreinterpretq_s32_s8(vld1q_s8(&b->value));
    x0 = widen_bytes(vreinterpretq_s8_s32(vzip1q_s32(row_a, row_b)));
    x1 = widen_bytes(vreinterpretq_s8_s32(vzip2q_s32(row_a, row_b)));
  }
  static GQA_INLINE void load_pairs(const Int4Pair* a, const Int4Pair* b, I& even, I& odd) {
    const uint32x2_t row_a = vreinterpret_u32_u8(vld1_u8(&a->bits));
    const uint32x2_t row_b = vreinterpret_u32_u8(vld1_u8(&b->bits));
    int8x16_t x, y;
    nibbles(vreinterpretq_u8_u32(vcombine_u32(vzip1_u32(row_a, row_b), vzip2_u32(row_a, row_b))), x,
            y);
    even = widen_bytes(x);
    odd = widen_bytes(y);
  }
  template <class S>
  static GQA_INLINE void order_pairs(F& x0, F& x1) {
    if (kNumbersPerElement<S> == 2) interleave(x0, x1);
  }
  static GQA_INLINE int16x4_t set_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return vreinterpret_s16_s32(vdup_n_s32(pair));
  }
  static GQA_INLINE void add_products(I& sum, int16x4_t pair, I x) {
    sum = {add_products(sum.a, pair, x.a), add_products(sum.b, pair, x.b)};
  }
  static GQA_INLINE void add_products(I& sum, I x, I y) {
    sum = {add_products(sum.a, x.a, y.a), add_products(sum.b, x.b, y.b)};
  }
  static GQA_INLINE F to_float(I x) {
    return {vcvtq_f32_s32(vreinterpretq_s32_s16(x.a)), vcvtq_f32_s32(vreinterpretq_s32_s16(x.b))};
  }
  static GQA_INLINE void store_int16(int16_t* p, F x) { vst1q_s16(p, round_int16(x)); }
  static constexpr bool kShiftsFp8 = false;
  template <class S>
  static constexpr bool kDeinterleaves = false;

  template <class S>
  static GQA_INLINE void load_block(const S* p, F& x0, F& x1) {
    x0 = load(p);
    x1 = load(p + kWidth / kNumbersPerElement<S>);
  }
  template <int kPart, class S>
  static GQA_INLINE F load_part(const S* p) {
    return load(p + kPart * kWidth / kNumbersPerElement<S>);
  }
  static GQA_INLINE void deinterleave(F& x0, F& x1) {
    const F low = x0, high = x1;
    x0 = {vuzp1q_f32(low.a, low.b), vuzp1q_f32(high.a, high.b)};
    x1 = {vuzp2q_f32(low.a, low.b), vuzp2q_f32(high.a, high.b)};
  }
  static GQA_INLINE void interleave(F& even, F& odd) {
    const F x = even, y = odd;
    even = {vzip1q_f32(x.a, y.a), vzip2q_f32(x.a, y.a)};
    odd = {vzip1q_f32(x.b, y.b), vzip2q_f32(x.b, y.b)};
  }
  // Compilers keep vectors in registers by themselves: no instruction takes one from memory.
  static GQA_INLINE void pin(F&) {}
  static GQA_INLINE void pin(I&) {}

  static GQA_INLINE void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
  }
  static GQA_INLINE void store(BFloat16* p, F x) {
    const F rounded = round_to(x, p);
    vst1q_u16(&p->bits, vcombine_u16(vshrn_n_u32(vreinterpretq_u32_f32(rounded.a), 16),
                                     vshrn_n_u32(vreinterpretq_u32_f32(rounded.b), 16)));
  }
  static GQA_INLINE void store(Float16* p, F x) { vst1q_u16(&p->bits, narrow(x)); }
  static GQA_INLINE F round_to(F x, const float*) { return x; }
  static GQA_INLINE F round_to(F x, const BFloat16*) { return {round_bf16(x.a), round_bf16(x.b)}; }
  static GQA_INLINE F round_to(F x, const Float16*) { return widen(narrow(x)); }

  static GQA_INLINE F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static GQA_INLINE F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static GQA_INLINE F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static GQA_INLINE F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static GQA_INLINE F fma(F x, F y, F z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)};
  }
  // The instruction for it would return a NaN.
  static GQA_INLINE F max(F x, F y) { return select(less(y, x), x, y); }
  static GQA_INLINE F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
  static GQA_INLINE F copy_sign(F magnitude, F sign) {
    const uint32x4_t bit = vdupq_n_u32(0x80000000u);
    return {vbslq_f32(bit, sign.a, magnitude.a), vbslq_f32(bit, sign.b, magnitude.b)};
  }

  static GQA_INLINE Mask less(F x, F y) { return {vcltq_f32(x.a, y.a), vcltq_f32(x.b, y.b)}; }
  static GQA_INLINE Mask equal(F x, F y) { return {vceqq_f32(x.a, y.a), vceqq_f32(x.b, y.b)}; }
  static GQA_INLINE Mask both(Mask x, Mask y) { return {vandq_u32(x.a, y.a), vandq_u32(x.b, y.b)}; }
  static GQA_INLINE F select(Mask mask, F x, F y) {
    return {vbslq_f32(mask.a, x.a, y.a), vbslq_f32(mask.b, x.b, y.b)};
  }

  static GQA_INLINE F add_to_exponent(F x, F n_bits) {
    return {add_to_exponent(x.a, n_bits.a), add_to_exponent(x.b, n_bits.b)};
  }

  static GQA_INLINE float reduce_add(F x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }
  static GQA_INLINE float reduce_max(F x) { return vmaxnmvq_f32(vmaxnmq_f32(x.a, x.b)); }
  template <class X>
  static GQA_INLINE void store_sums4(float* out, const X (&x)[4]) {
    vst1q_f32(out, sums4(x));
  }
  template <class X>
  static GQA_INLINE void store_sums2x2(float* p, float* q, const X (&x)[4]) {
    const float32x4_t sums = sums4(x);
    vst1_f32(p, vget_low_f32(sums));
    vst1_f32(q, vget_high_f32(sums));
  }
  static GQA_INLINE void transpose(F (&x)[kWidth]) {
    float32x4_t blocks[4][4];  // of 4 x 4: upper left, lower left, upper right, lower right
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      blocks[0][i] = x[i].a;
      blocks[1][i] = x[i + 4].a;
      blocks[2][i] = x[i].b;
      blocks[3][i] = x[i + 4].b;
    }
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) transpose4(blocks[i]);
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      x[i] = {blocks[0][i], blocks[1][i]};
      x[i + 4] = {blocks[2][i], blocks[3][i]};
    }
  }

 protected:
  static GQA_INLINE F widen(uint16x8_t halves) {
    const float16x8_t x = vreinterpretq_f16_u16(halves);
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  }
  static GQA_INLINE F widen(int8x8_t integers) {
    const int16x8_t x = vmovl_s8(integers);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
  }
  static GQA_INLINE int16x8_t round_int16(F x) {
    return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.a)), vqmovn_s32(vcvtnq_s32_f32(x.b)));
  }
  static GQA_INLINE uint16x8_t narrow(F x) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b));
  }
  static GQA_INLINE float32x4_t round_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t rounded = vandq_u32(sum, vdupq_n_u32(0xffff0000u));
    return vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000)));
  }
  static GQA_INLINE float32x4_t add_to_exponent(float32x4_t x, float32x4_t n_bits) {
    const int32x4_t shifted = vshlq_n_s32(vreinterpretq_s32_f32(n_bits), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), shifted));
  }
  // Sums of the lanes of four vectors.
  static GQA_INLINE float32x4_t sums4(const F (&x)[4]) {
    float32x4_t halves[4];
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) halves[i] = vaddq_f32(x[i].a, x[i].b);
    return vpaddq_f32(vpaddq_f32(halves[0], halves[1]), vpaddq_f32(halves[2], halves[3]));
  }
  static GQA_INLINE float32x4_t sums4(const I (&x)[4]) {
    int32x4_t halves[4];
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      halves[i] = vaddq_s32(vreinterpretq_s32_s16(x[i].a), vreinterpretq_s32_s16(x[i].b));
    }
    return vcvtq_f32_s32(
        vpaddq_s32(vpaddq_s32(halves[0], halves[1]), vpaddq_s32(halves[2], halves[3])));
  }
  static GQA_INLINE I widen_bytes(int8x16_t x) {
    return {vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)};
  }
  // The halves of bytes less the default zero of int4.
  static GQA_INLINE void nibbles(uint8x16_t bytes, int8x16_t& even, int8x16_t& odd) {
    const int8x16_t eight = vdupq_n_s8(8);
    even = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), eight);
    odd = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), eight);
  }
  // sum[i] += x[i] * y[i] + x[i + 4] * y[i + 4], in 32 bits.
  static GQA_INLINE int16x8_t add_products(int16x8_t sum, int16x8_t x, int16x8_t y) {
    const int32x4_t low = vmlal_s16(vreinterpretq_s32_s16(sum), vget_low_s16(x), vget_low_s16(y));
    return vreinterpretq_s16_s32(vmlal_high_s16(low, x, y));
  }
  // sum[i] += pair[0] * x[i] + pair[1] * x[i + 4], likewise.
  static GQA_INLINE int16x8_t add_products(int16x8_t sum, int16x4_t pair, int16x8_t x) {
    const int32x4_t low = vmlal_lane_s16(vreinterpretq_s32_s16(sum), vget_low_s16(x), pair, 0);
    return vreinterpretq_s16_s32(vmlal_high_lane_s16(low, x, pair, 1));
  }
  static GQA_INLINE void transpose4(float32x4_t (&x)[4]) {
    const float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1]));
    const float64x2_t odd01 = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    const float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3]));
    const float64x2_t odd23 = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
  }
};

#if !defined(GQA_EXTENDS_NEON)
using Vec = NeonVec;
#endif

}  // namespace gqa::cpu::GQA_ISA
