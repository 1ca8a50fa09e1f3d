// One row of the backward's middle part: from scores and dP to P and dS.
//
//   P  = exp(S - LSE)           dS = P * (dP * keep - delta), times the softcap's derivative
//
// Both are rounded to the input type, as the forward rounds P (FlashAttention-2, arXiv 2307.08691,
// algorithm 2). Scores are in units of log2(e); the scale of dS is left to dQ and dK.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa.h"
#include "math.h"
#include "softmax.h"

namespace gqa::cpu::GQA_ISA {

// What a row brings along.
struct BackwardRow {
  float lse;          // log2 units
  float delta;        // rowsum(dout * out) - dlse
  const float* keep;  // dropout's factors of the tile's keys, or nullptr
};

// Sums over a row's keys for the gradient of its ALiBi slope, sum of dS * -distance. That delta is
// taken from the output, which is rounded, would show there: distances are large and dS sums to
// about 0. So delta is summed anew.
struct SlopeSums {
  float dp_distance;  // P * dP * distance
  float distance;     // P * distance
  float dp;           // P * dP

  float gradient(float dlse) const { return (dp - dlse) * distance - dp_distance; }
};

// slope: sums to add to, or nullptr; only where kBias.
template <class V, class T, bool kBias>
inline void backward_row(float* p, float* ds, const RowKeys& keys, float scale, const RowBias& bias,
                         const BackwardRow& row, SlopeSums* slope) {
  using F = typename V::F;
  const T* type = nullptr;
  const int begin = keys.begin / V::kWidth * V::kWidth;
  const F zero = V::set1(0.0f);
  const F factor = V::set1(kBias ? scale : scale * kLog2E);
  const F minus_lse = V::set1(-row.lse), minus_delta = V::set1(-row.delta);
  RowBias uncapped = bias;
  uncapped.softcap = 0.0f;
  F dp_distance_sum = zero, distance_sum = zero, dp_sum = zero;

  for (int i = begin; i < keys.end; i += V::kWidth) {
    F x = V::mul(V::load(p + i), factor);
    F derivative = V::set1(1.0f);
    if (kBias) {
      if (bias.softcap != 0.0f) {
        derivative = tanh_derivative<V>(V::div(x, V::set1(bias.softcap)));
        x = soft_cap<V>(x, bias.softcap);
      }
      x = add_bias<V>(x, i, uncapped);
    }
    F probability = exp2<V>(V::add(x, minus_lse));
    if (i < keys.visible_begin || i + V::kWidth > keys.visible_end) {
      const F lane = V::add(V::iota(), V::set1(static_cast<float>(i)));
      const F first = V::set1(static_cast<float>(keys.visible_begin - 1));
      const F last = V::set1(static_cast<float>(keys.visible_end));
      probability = V::select(V::both(V::less(first, lane), V::less(lane, last)), probability, zero);
    }
    F dp = V::load(ds + i), kept = probability;
    if (row.keep != nullptr) {
      const F keep = V::load(row.keep + i);
      dp = V::mul(dp, keep);
      kept = V::mul(kept, keep);
    }
    F gradient = V::mul(probability, V::add(dp, minus_delta));
    if (kBias) {
      if (slope != nullptr) {
        const F lane = V::add(V::iota(), V::set1(static_cast<float>(i)));
        const F distance = V::abs(V::sub(V::set1(bias.position), lane));
        const F weight = V::mul(probability, distance);
        dp_distance_sum = V::fma(weight, dp, dp_distance_sum);
        distance_sum = V::add(distance_sum, weight);
        dp_sum = V::fma(probability, dp, dp_sum);
      }
      gradient = V::mul(gradient, derivative);
    }
    V::store(p + i, V::round_to(kept, type));
    V::store(ds + i, V::round_to(gradient, type));
  }
  if (kBias && slope != nullptr) {
    slope->dp_distance += V::reduce_add(dp_distance_sum);
    slope->distance += V::reduce_add(distance_sum);
    slope->dp += V::reduce_add(dp_sum);
  }
}

}  // namespace gqa::cpu::GQA_ISA
