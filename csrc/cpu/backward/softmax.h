// One row of the backward's middle part: from scores and dP to P and dS.
//
//   P  = exp(S - LSE)           dS = P * (dP * keep - delta), times the softcap's derivative
//
// Both are rounded to the input type, as the forward rounds P (FlashAttention-2, arXiv 2307.08691,
// algorithm 2). Scores are in kScoreUnit. dQ and dK apply the scale of dS.
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
  float lse;          // in kScoreUnit, rounded to fp32
  float lse_rest;     // what that rounding took off, 0 in natural units: the exponent of P is a
                      // small difference of numbers that may be large
  float delta;        // rowsum(dout * out) - dlse
  const float* keep;  // dropout's factors of the tile's keys, or nullptr
};

// Sums over a row's keys for the gradients of its ALiBi slope (sum of dS * -distance) and its sink.
// Each of these gradients is one number, in which the errors of delta from the rounded output would
// add up over all rows. The sum of dS tells that error: with an exact delta the sum is
// dlse + sink * delta.
struct RowSums {
  float ds;           // dS before the softcap's derivative
  float distance;     // P * distance
  float ds_distance;  // dS * distance

  // A delta summed from P and dP, minus this one. sink: the sink's probability.
  float delta_error(float delta, float sink, float dlse) const { return ds - sink * delta - dlse; }
  float slope(float error) const { return error * distance - ds_distance; }
};

// sums: to add to, or nullptr.
template <class V, class T, bool kBias>
inline void backward_row(float* p, float* ds, const RowKeys& keys, float scale, const RowBias& bias,
                         const BackwardRow& row, RowSums* sums) {
  using F = typename V::F;
  const T* type = nullptr;
  const int begin = keys.begin / V::kWidth * V::kWidth;
  const F zero = V::set1(0.0f);
  const F factor = V::set1(kBias && bias.softcap != 0.0f ? scale : scale * kScoreUnit<T>);
  const F minus_lse = V::set1(-row.lse), minus_rest = V::set1(-row.lse_rest);
  const F minus_delta = V::set1(-row.delta);
  F ds_sum = zero, distance_sum = zero, ds_distance_sum = zero;

  for (int i = begin; i < keys.end; i += V::kWidth) {
    F x = V::mul(V::load(p + i), factor);
    F derivative = V::set1(1.0f);
    if (kBias) {
      if (bias.softcap != 0.0f) {
        derivative = tanh_derivative<V>(V::div(x, V::set1(bias.softcap)));
        x = soft_cap<V, T>(x, bias.softcap);
      }
      x = add_bias<V, T>(x, i, bias);
    }
    F probability = exp_score<V, T>(V::add(V::add(x, minus_lse), minus_rest));
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
      ds_sum = V::add(ds_sum, gradient);
      distance_sum = V::fma(probability, distance, distance_sum);
      ds_distance_sum = V::fma(gradient, distance, ds_distance_sum);
    }
    if (kBias) gradient = V::mul(gradient, derivative);
    V::store(p + i, V::round_to(kept, type));
    V::store(ds + i, V::round_to(gradient, type));
  }
  if (sums != nullptr) {
    sums->ds += V::reduce_add(ds_sum);
    sums->distance += V::reduce_add(distance_sum);
    sums->ds_distance += V::reduce_add(ds_distance_sum);
  }
}

}  // namespace gqa::cpu::GQA_ISA
