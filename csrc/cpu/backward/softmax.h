// One row of the backward's middle part: from scores and dP to P and dS.
//
//   P  = exp(S - LSE)           dS = P * (dP * keep - delta), times the softcap's derivative
//
// Both are rounded to the input type, as the forward rounds P (FlashAttention-2, arXiv 2307.08691,
// algorithm 2). Scores are in units of log2(e). dQ and dK apply the scale of dS.
//
// The score must be rounded exactly as in the forward (softmax.h there): a difference in its last
// digit changes P, and rows of P then no longer match the output that delta is computed from.
// -ffp-contract=off keeps compilers from fusing the score's product with the subtraction of the
// LSE.
#pragma once

#include <cmath>
#include <cstdint>

#include "../forward/softmax.h"
#include "../isa/isa.h"
#include "../isa/math.h"

namespace gqa::cpu::GQA_ISA {

// The inputs of one row.
struct BackwardRow {
  float lse;          // log2 units, rounded to fp32
  float lse_rest;     // what that rounding took off: the exponent of P is a small difference of
                      // numbers that may be large
  float delta;        // rowsum(dout * out) - dlse
  const float* keep;  // dropout's factors of the tile's keys, or nullptr
};

// Sums over a row's keys for the gradients of its ALiBi slope (sum of dS * -distance) and its sink.
// These add up whole rows, in which dS sums to about 0, so the rounding of the output would show in
// them through delta. They use a delta that is summed from P and dP instead.
struct RowSums {
  float dp;           // P * dP
  float distance;     // P * distance
  float dp_distance;  // P * dP * distance

  float slope(float dlse) const { return (dp - dlse) * distance - dp_distance; }
  float sink(float probability, float dlse) const { return -probability * (dp - dlse); }
};

// sums: to add to, or nullptr.
template <class V, class T, bool kBias>
inline void backward_row(float* p, float* ds, const RowKeys& keys, float scale, const RowBias& bias,
                         const BackwardRow& row, RowSums* sums) {
  using F = typename V::F;
  const T* type = nullptr;
  const int begin = keys.begin / V::kWidth * V::kWidth;
  const F zero = V::set1(0.0f);
  const F factor = V::set1(kBias && bias.softcap != 0.0f ? scale : scale * kLog2E);
  const F minus_lse = V::set1(-row.lse), minus_rest = V::set1(-row.lse_rest);
  const F minus_delta = V::set1(-row.delta);
  F dp_distance_sum = zero, distance_sum = zero, dp_sum = zero;

  for (int i = begin; i < keys.end; i += V::kWidth) {
    F x = V::mul(V::load(p + i), factor);
    F derivative = V::set1(1.0f);
    if (kBias) {
      if (bias.softcap != 0.0f) {
        derivative = tanh_derivative<V>(V::div(x, V::set1(bias.softcap)));
        x = soft_cap<V>(x, bias.softcap);
      }
      x = add_bias<V>(x, i, bias);
    }
    F probability = exp2<V>(V::add(V::add(x, minus_lse), minus_rest));
    if (i < keys.visible_begin || i + V::kWidth > keys.visible_end) {
      const F lane = V::add(V::iota(), V::set1(static_cast<float>(i)));
      const F first = V::set1(static_cast<float>(keys.visible_begin - 1));
      const F last = V::set1(static_cast<float>(keys.visible_end));
      probability =
          V::select(V::both(V::less(first, lane), V::less(lane, last)), probability, zero);
    }
    F dp = V::load(ds + i), kept = probability;
    if (row.keep != nullptr) {
      const F keep = V::load(row.keep + i);
      dp = V::mul(dp, keep);
      kept = V::mul(kept, keep);
    }
    F gradient = V::mul(probability, V::add(dp, minus_delta));
    if (sums != nullptr) {
      const F lane = V::add(V::iota(), V::set1(static_cast<float>(i)));
      const F distance = V::abs(V::sub(V::set1(bias.position), lane));
      const F p_dp = V::mul(probability, dp);
      dp_sum = V::add(dp_sum, p_dp);
      distance_sum = V::fma(probability, distance, distance_sum);
      dp_distance_sum = V::fma(p_dp, distance, dp_distance_sum);
    }
    if (kBias) gradient = V::mul(gradient, derivative);
    V::store(p + i, V::round_to(kept, type));
    V::store(ds + i, V::round_to(gradient, type));
  }
  if (sums != nullptr) {
    sums->dp += V::reduce_add(dp_sum);
    sums->distance += V::reduce_add(distance_sum);
    sums->dp_distance += V::reduce_add(dp_distance_sum);
  }
}

}  // namespace gqa::cpu::GQA_ISA
