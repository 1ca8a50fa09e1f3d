// NEON with products of fp16 that are added to fp32 (FMLAL). The interface for products_halves.h.
#pragma once

#include "vec_neon.h"

namespace gqa::cpu::GQA_ISA {

struct Vec : NeonVec {
  struct Halves {  // 16 numbers
    float16x8_t a, b;
  };
  using Weights = float16x4_t;

  static GQA_INLINE Halves load_halves(const Float16* p) { return {load8(p), load8(p + 8)}; }
  static GQA_INLINE void add_products(F& sum, Halves x, Halves y) {
    sum.a = vfmlalq_low_f16(sum.a, x.a, y.a);
    sum.b = vfmlalq_high_f16(sum.b, x.a, y.a);
    sum.a = vfmlalq_low_f16(sum.a, x.b, y.b);
    sum.b = vfmlalq_high_f16(sum.b, x.b, y.b);
  }

  static GQA_INLINE Weights load_weights(const Float16* p) {
    uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return vreinterpret_f16_u32(vdup_n_u32(bits));
  }
  // Of two rows.
  static GQA_INLINE void load_columns(const Float16* a, const Float16* b, Halves& x0, Halves& x1) {
    x0 = load_halves(a);
    x1 = load_halves(b);
  }
  static GQA_INLINE void order_columns(float*) {}
  static GQA_INLINE void add_columns(F& sum0, F& sum1, Weights w, Halves x0, Halves x1) {
    sum0.a = vfmlalq_lane_low_f16(sum0.a, x0.a, w, 0);
    sum0.b = vfmlalq_lane_high_f16(sum0.b, x0.a, w, 0);
    sum1.a = vfmlalq_lane_low_f16(sum1.a, x0.b, w, 0);
    sum1.b = vfmlalq_lane_high_f16(sum1.b, x0.b, w, 0);
    sum0.a = vfmlalq_lane_low_f16(sum0.a, x1.a, w, 1);
    sum0.b = vfmlalq_lane_high_f16(sum0.b, x1.a, w, 1);
    sum1.a = vfmlalq_lane_low_f16(sum1.a, x1.b, w, 1);
    sum1.b = vfmlalq_lane_high_f16(sum1.b, x1.b, w, 1);
  }

 private:
  static GQA_INLINE float16x8_t load8(const Float16* p) {
    return vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  }
};

}  // namespace gqa::cpu::GQA_ISA
