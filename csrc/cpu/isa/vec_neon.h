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

struct Vec {
  struct F {
    float32x4_t a, b;
  };
  struct Mask {
    uint32x4_t a, b;
  };
  static constexpr int kWidth = 8;

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
  static constexpr bool kHasInt16 = false;
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
  static GQA_INLINE void store_sums4(float* out, const F (&x)[4]) { vst1q_f32(out, sums4(x)); }
  static GQA_INLINE void store_sums2x2(float* p, float* q, const F (&x)[4]) {
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

 private:
  static GQA_INLINE F widen(uint16x8_t halves) {
    const float16x8_t x = vreinterpretq_f16_u16(halves);
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
  }
  static GQA_INLINE F widen(int8x8_t integers) {
    const int16x8_t x = vmovl_s8(integers);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
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

}  // namespace gqa::cpu::GQA_ISA
