// Online softmax of one row of scores: bias and visibility, running maximum and sum, probabilities.
//
// Scores of 16-bit and quantised keys are kept in units of ln 2, so that exp(s) is one exp2. Those of
// fp32 keys stay in natural units, as the LSE is. If one key outweighs the others, the LSE is then
// the very number that its score is, and the backward's P = exp(score - LSE) is exactly 1. The
// rounding from one unit to the other would be a relative error of P, 6e-5 for scores near 1,000.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "../isa/isa.h"
#include "../isa/math.h"

namespace gqa::cpu::GQA_ISA {

// A natural unit in units of the scores of keys stored as S.
template <class S>
constexpr float kScoreUnit = std::is_same_v<S, float> ? 1.0f : kLog2E;

// exp of a difference of such scores.
template <class V, class S>
GQA_INLINE typename V::F exp_score(typename V::F x) {
  if constexpr (std::is_same_v<S, float>) return exp2<V>(V::mul(x, V::set1(kLog2E)));
  return exp2<V>(x);
}

// The same of one number, with the vectors' rounding.
template <class V, class S>
GQA_INLINE float exp_score_scalar(float x) {
  float lanes[V::kWidth];
  V::store(lanes, exp_score<V, S>(V::set1(x)));
  return lanes[0];
}

// The changes to a row's scores besides scale and visibility.
struct RowBias {
  float softcap;          // 0: off
  float slope;            // ALiBi, times kScoreUnit
  float position;         // of the query, counted from the tile's first key
  const float* additive;  // [keys of the tile]; nullptr: none
};

// Keys of the tile: those computed, and those this row sees among them.
struct RowKeys {
  int begin, end;
  int visible_begin, visible_end;
};

template <class V, class T>
inline void widen_mask(const void* data, int64_t offset, int64_t stride, int begin, int end,
                       float* out) {
  const T* mask = static_cast<const T*>(data) + offset;
  if (stride == 1) return widen_row<V>(mask + begin, end - begin, out + begin);
  for (int i = begin; i < end; ++i) widen_row<V>(mask + i * stride, 1, out + i);
}

// A row of the mask: element i of the result is attn_mask[b, h, token, first + i], for i in [begin,
// end); a boolean mask gives 0 or -inf. The result is the mask's own memory or `out`. Reading whole
// vectors of it is allowed.
template <class V>
inline const float* mask_row(const AttentionParams& params, int64_t b, int64_t h, int64_t token,
                             int64_t first, int begin, int end, float* out) {
  const int64_t offset = b * params.mask_stride_b + h * params.mask_stride_h +
                         token * params.mask_stride_q + first * params.mask_stride_k;
  const int64_t stride = params.mask_stride_k;
  switch (params.mask_dtype) {
    case DType::kBool: {
      const uint8_t* mask = static_cast<const uint8_t*>(params.attn_mask) + offset;
      for (int i = begin; i < end; ++i) out[i] = mask[i * stride] ? 0.0f : -INFINITY;
      break;
    }
    case DType::kFloat32:
      if (stride == 1 && begin % V::kWidth == 0 && end % V::kWidth == 0) {
        return static_cast<const float*>(params.attn_mask) + offset;
      }
      widen_mask<V, float>(params.attn_mask, offset, stride, begin, end, out);
      break;
    case DType::kBFloat16:
      widen_mask<V, BFloat16>(params.attn_mask, offset, stride, begin, end, out);
      break;
    case DType::kFloat16:
      widen_mask<V, Float16>(params.attn_mask, offset, stride, begin, end, out);
      break;
    default: break;  // no mask has another type
  }
  return out;
}

// Caps a score in natural units, and converts it to kScoreUnit.
template <class V, class S>
GQA_INLINE typename V::F soft_cap(typename V::F score, float softcap) {
  const typename V::F cap = V::set1(softcap);
  return V::mul(V::mul(cap, tanh<V>(V::div(score, cap))), V::set1(kScoreUnit<S>));
}

// score: capped, in kScoreUnit
template <class V, class S>
GQA_INLINE typename V::F add_bias(typename V::F score, int key, const RowBias& bias) {
  using F = typename V::F;
  if (bias.slope != 0.0f) {
    const F keys = V::add(V::iota(), V::set1(static_cast<float>(key)));
    const F distance = V::abs(V::sub(V::set1(bias.position), keys));
    score = V::fma(V::set1(-bias.slope), distance, score);
  }
  if (bias.additive != nullptr) {
    const F added = V::load(bias.additive + key);
    const F hidden = V::set1(-INFINITY);
    const F sum = V::fma(added, V::set1(kScoreUnit<S>), score);
    score = V::select(V::less(added, V::set1(kLowestMaskValue)), hidden, sum);
  }
  return score;
}

// The factors of scores and probabilities of a quantised cache: see dequantize.h.
struct RowScales {
  float q_sum;
  const float *k_scale, *k_zero, *v_scale;  // [keys of the tile]; k_zero: or nullptr
};

// Applies scale and bias to scores[begin, end), and -inf to keys that the row does not see. Returns
// the maximum. kBias, kScaled: whether there are bias and scales.
template <class V, class S, bool kBias, bool kScaled>
GQA_INLINE float finish_row_scores(float* scores, const RowKeys& keys, float scale,
                                   const RowBias& bias, const RowScales& scales) {
  using F = typename V::F;
  const F factor = V::set1(kBias && bias.softcap != 0.0f ? scale : scale * kScoreUnit<S>);
  const F hidden = V::set1(-INFINITY);
  F most = hidden;
  for (int i = keys.begin / V::kWidth * V::kWidth; i < keys.end; i += V::kWidth) {
    F x = V::load(scores + i);
    if (kScaled) {
      if (scales.k_zero) x = V::fma(V::set1(-scales.q_sum), V::load(scales.k_zero + i), x);
      x = V::mul(x, V::load(scales.k_scale + i));
    }
    x = V::mul(x, factor);
    if (kBias) {
      if (bias.softcap != 0.0f) x = soft_cap<V, S>(x, bias.softcap);
      x = add_bias<V, S>(x, i, bias);
    }
    if (i < keys.visible_begin || i + V::kWidth > keys.visible_end) {
      const F lane = V::add(V::iota(), V::set1(static_cast<float>(i)));
      const F first = V::set1(static_cast<float>(keys.visible_begin - 1));
      const F last = V::set1(static_cast<float>(keys.visible_end));
      x = V::select(V::both(V::less(first, lane), V::less(lane, last)), x, hidden);
    }
    V::store(scores + i, x);
    most = V::max(x, most);
  }
  return V::reduce_max(most);
}

// Replaces scores by probabilities exp(s - max) of type P in the same memory. `max` and `sum` are
// the row's state, block_max the maximum of the scores. Returns the factor that rescales what was
// accumulated with the old maximum. keep: dropout's factors of the tile's keys, or nullptr. The sum
// includes neither dropout nor the scales of V. `most` becomes the largest magnitude of the
// probabilities times the scales of V, or NaN if there is one.
template <class V, class S, bool kScaled, class P>
GQA_INLINE float exponentiate_row(float* scores, const RowKeys& keys, float block_max,
                                  const RowScales& scales, const float* keep, float& max,
                                  float& sum, float& most) {
  using F = typename V::F;
  const float old_max = max;
  if (block_max > max) max = block_max;
  // While no key is visible, 0 replaces the maximum: exp(-inf - 0) = 0.
  const float base = max == -INFINITY ? 0.0f : max;
  const F minus_base = V::set1(-base);

  F total = V::set1(0.0f), largest = total, bad = total;
  P* probabilities = reinterpret_cast<P*>(
      scores);  // P is no wider, so it never overwrites scores that are still needed
  for (int i = keys.begin / V::kWidth * V::kWidth; i < keys.end; i += V::kWidth) {
    F p = exp_score<V, S>(V::add(V::load(scores + i), minus_base));
    total = V::add(total, p);
    if (keep != nullptr) p = V::mul(p, V::load(keep + i));
    if (kScaled) {
      p = V::mul(p, V::load(scales.v_scale + i));
      largest = V::max(V::abs(p), largest);
      bad = V::fma(p, V::set1(0.0f), bad);  // NaN of infinities and NaN
    }
    V::store(probabilities + i, p);
  }
  if (kScaled) most = V::reduce_max(largest) + V::reduce_add(bad);

  const float rescale = old_max == max ? 1.0f : exp_score_scalar<V, S>(old_max - base);
  sum = sum * rescale + V::reduce_add(total);
  return rescale;
}

}  // namespace gqa::cpu::GQA_ISA
