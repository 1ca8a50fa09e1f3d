// Quantised K and V: the products are computed from stored numbers. Scales and zeros are applied to
// scores and probabilities, once per key instead of once per element:
//
//   q . (scale * (k - zero)) = scale * (q . k - zero * sum(q))
//   p * scale * (v - zero)   = (p * scale) * v - (p * scale) * zero
#pragma once

#include <cmath>
#include <cstdint>

#include "../../core/params.h"
#include "../isa/isa.h"
#include "../isa/scalars.h"
#include "kv_rows.h"
#include "softmax.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// A load returns 1 / all of a value. The scales of K and V, and the factors of Products on q and o,
// correct that.
struct LoadedPart {
  float all, k_scale, v_scale;
};
template <class S>
inline constexpr LoadedPart kLoadedPart{1.0f, 1.0f, 1.0f};
template <>
inline constexpr LoadedPart kLoadedPart<Float8E4M3>{256.0f, 256.0f, 256.0f};
template <>
inline constexpr LoadedPart kLoadedPart<BitShiftedFp8<Float8E4M3>>{0x1p120f, 0x1p56f, 0x1p64f};
template <>
inline constexpr LoadedPart kLoadedPart<BitShiftedFp8<Float8E5M2>>{0x1p112f, 0x1p48f, 0x1p64f};

// Loads subtract a format's default zero, and zeros are relative to it. So a cache without zeros
// needs no correction, and with zeros little cancels in the correction.
template <class S>
inline constexpr float kLoadedZero = 0.0f;
template <>
inline constexpr float kLoadedZero<Int4Pair> = 8.0f;

// The scales and zeros of a tile's keys, for one (key head, value head) pair. S, SV: types of K and V.
template <class V, class S, class SV>
class Dequantizer {
 public:
  Dequantizer(const AttentionParams& params, const Pages& pages, int64_t k_head, int64_t v_head,
              Tile<V>& tile)
      : params_(params), pages_(pages), k_head_(k_head), v_head_(v_head), tile_(tile) {}

  void begin(int rows) {
    for (int r = 0; r < rows; ++r) {
      const float* q = tile_.q + r * tile_.layout.q_ld;
      typename V::F sum = V::set1(0.0f);
      for (int64_t d = 0; d < tile_.layout.q_ld; d += kW) sum = V::add(sum, V::load(q + d));
      tile_.q_sum[r] = V::reduce_add(sum);
    }
  }

  // Prefetches the scales and zeros of the next tile.
  void prefetch(int64_t first, int n) const {
    prefetch_row_values(pages_, params_.k_scale, params_.k_scale_stride, k_head_, first, n);
    prefetch_row_values(pages_, params_.v_scale, params_.v_scale_stride, v_head_, first, n);
    prefetch_row_values(pages_, params_.k_zero, params_.k_zero_stride, k_head_, first, n);
    prefetch_row_values(pages_, params_.v_zero, params_.v_zero_stride, v_head_, first, n);
  }

  void begin_tile(int64_t first, int n) {
    // The score of a key without a page must be NaN, whatever was read as its row.
    constexpr LoadedPart kPart = kLoadedPart<S>, kValuePart = kLoadedPart<SV>;
    fetch(params_.k_scale, params_.k_scale_stride, k_head_, first, n,
          {kPart.k_scale, 0.0f, kPart.k_scale, NAN}, tile_.k_scale);
    fetch(params_.v_scale, params_.v_scale_stride, v_head_, first, n,
          {kValuePart.v_scale, 0.0f, kValuePart.v_scale, 1.0f}, tile_.v_scale);
    if (has_k_zero()) {
      constexpr RowValueUse kZero{1.0f / kPart.all, -kLoadedZero<S>, 0.0f, 0.0f};
      fetch(params_.k_zero, params_.k_zero_stride, k_head_, first, n, kZero, tile_.k_zero);
    }
    if (has_v_zero()) {
      constexpr RowValueUse kZero{1.0f / kValuePart.all, -kLoadedZero<SV>, 0.0f, 0.0f};
      fetch(params_.v_zero, params_.v_zero_stride, v_head_, first, n, kZero, tile_.v_zero);
    }
  }

  RowScales row_scales(int r) const {
    return {tile_.q_sum[r], tile_.k_scale, has_k_zero() ? tile_.k_zero : nullptr, tile_.v_scale};
  }

  // Subtracts the zeros of V from o; probabilities are multiplied with the scales of V already.
  void subtract_zeros(int r, StripKeys keys) {
    if (!has_v_zero()) return;
    const float* p = tile_.s + r * tile_.layout.keys;
    typename V::F offset = V::set1(0.0f);
    for (int i = keys.begin / kW * kW; i < keys.end; i += kW) {
      offset = V::fma(V::load(p + i), V::load(tile_.v_zero + i), offset);
    }
    float* o = tile_.o + r * tile_.layout.o_ld;
    const typename V::F minus_offset = V::set1(-V::reduce_add(offset));
    for (int64_t d = 0; d < tile_.layout.o_ld; d += kW) {
      V::store(o + d, V::add(V::load(o + d), minus_offset));
    }
  }

 private:
  static constexpr int kW = V::kWidth;

  bool has_k_zero() const { return params_.k_zero != nullptr; }
  bool has_v_zero() const { return params_.v_zero != nullptr; }

  // Up to the end of the last vector: what is beyond the keys is 0.
  void fetch(const float* data, const Strides& strides, int64_t head, int64_t first, int n,
             const RowValueUse& use, float* out) {
    fetch_row_values(pages_, data, strides, head, first, n, use, out);
    for (int i = n; i % kW != 0; ++i) out[i] = 0.0f;
  }

  const AttentionParams& params_;
  const Pages& pages_;
  int64_t k_head_, v_head_;
  Tile<V>& tile_;
};

}  // namespace gqa::cpu::GQA_ISA
