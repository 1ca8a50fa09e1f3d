// Both products of direct tasks over int8 or int4 K and V with 16-bit queries, in integers: one
// instruction multiplies and adds twice as many 16-bit integers as floats, and stored numbers need
// less widening.
//
//   q ~ step * int16      the largest number of the row is 32767 steps, or fewer if D > 512
//   p ~ step * int16      likewise, after multiplication with the scales of V; a step per tile
//
// Sums are exact: a product is at most 2^22, a tile has 64 keys, and D numbers of q are few enough
// steps for an int32. The rounding error of q is 1/256 of K's in int8, and that of p is 1/64 of
// bf16's. The LSE is fp32 for every type, so a call that needs it adds a second int16 part of q: the
// rounding error of the first.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "direct_loops.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

constexpr float kSecondPart = 1.0f / 32768.0f;
constexpr float kRoundToWhole = 3 << 22;  // x + this - this is x rounded, for |x| < 2^22

// Represents numbers of at most `max` as step * int16, `max` as `steps` of them. If `max` is NaN, so
// are all products.
struct Int16Scale {
  float step, inverse;
  Int16Scale(float max, float steps)
      : step(max / steps), inverse(max > 1e-34f ? steps / max : 0.0f) {}  // avoids an infinity
};

constexpr int kMostSteps = 32767;
// Steps of a row of q: its product with a row of int8 fits in an int32. If q is split into signed
// bytes, the upper one must fit.
template <class V>
constexpr float query_steps(int64_t head_dim) {
  constexpr int kMost = V::kSplitsQueries ? kMostSteps - 128 : kMostSteps;
  const int64_t fit = INT32_MAX / (128 * head_dim);
  return static_cast<float>(fit < kMost ? fit : kMost);
}

// The `n` numbers of `row` from d on, at most two vectors of int16. The rest of the vectors is
// arbitrary, because q is 0 there.
template <class V, class S>
GQA_INLINE void load_int16(const S* row, int64_t d, int64_t n, typename V::I& x0,
                           typename V::I& x1) {
  constexpr int kBlock = 4 * V::kWidth;
  if (n >= kBlock) return V::load_int16(at(row, d), x0, x1);
  S block[kBlock / kNumbersPerElement<S>] = {};
  std::memcpy(block, at(row, d), (n + kNumbersPerElement<S> - 1) / kNumbersPerElement<S>);
  V::load_int16(block, x0, x1);
}

// Pairs (a[i], b[i]) of the `n` numbers from d on of two rows, at most two vectors.
template <class V, class S>
GQA_INLINE void load_pairs(const S* a, const S* b, int64_t d, int64_t n, typename V::I& x0,
                           typename V::I& x1) {
  constexpr int kBlock = 2 * V::kWidth;
  if (n >= kBlock) return V::load_pairs(at(a, d), at(b, d), x0, x1);
  S block[2][kBlock / kNumbersPerElement<S>] = {};
  const int64_t bytes = (n + kNumbersPerElement<S> - 1) / kNumbersPerElement<S>;
  std::memcpy(block[0], at(a, d), bytes);
  std::memcpy(block[1], at(b, d), bytes);
  V::load_pairs(block[0], block[1], x0, x1);
}

// Whether one instruction multiplies two keys: sum[r, c] is then of keys c and c + 1, for even c.
template <class V>
constexpr bool kPairsKeys = [] {
  if constexpr (V::kSplitsQueries) return V::kPairsKeys;
  return false;
}();

// sum[r, c] += q[r] . k[c] over a block of numbers at d, of which there are n.
template <class V, class S, int kRows, int kKeys>
GQA_INLINE void multiply_int16(const int16_t* q, int64_t ldq, const S* const (&k)[kKeys], int64_t d,
                               int64_t n, typename V::I (&sum)[kRows][kKeys]) {
  using I = typename V::I;
  I x[2][kKeys];
  GQA_UNROLL(4)
  for (int c = 0; c < kKeys; ++c) load_int16<V>(k[c], d, n, x[0][c], x[1][c]);
  GQA_UNROLL(2)
  for (int i = 0; i < 2; ++i) {
    if constexpr (kPairsKeys<V>) {
      GQA_UNROLL(2)
      for (int c = 0; c < kKeys; c += 2) x[i][c] = V::pair_keys(x[i][c], x[i][c + 1]);
    }
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      I y = V::load_int16(q + r * ldq + d + i * 2 * V::kWidth);
      V::pin(y);  // compilers would rather load it again for every key
      GQA_UNROLL(4)
      for (int c = 0; c < kKeys; c += kPairsKeys<V> ? 2 : 1) {
        V::add_products(sum[r][c], y, x[i][c]);
      }
    }
  }
}

// s[r, 0..kKeys) = q[r] . rows[0..kKeys)
template <class V, class S, int kRows, int kKeys>
GQA_INLINE void dot_int16(const int16_t* q, int64_t ldq, const S* const* rows, int64_t head_dim,
                          float* s, int64_t lds) {
  constexpr int64_t kBlock = 4 * V::kWidth;
  q = opaque(q);
  const S* k[kKeys];
  typename V::I sum[kRows][kKeys];
  GQA_UNROLL(4)
  for (int c = 0; c < kKeys; ++c) k[c] = rows[c];
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) sum[r][c] = V::zero_integers();
  }
  int64_t d = 0;
  GQA_UNROLL(8)
  for (; d + kBlock <= head_dim; d += kBlock) multiply_int16<V>(q, ldq, k, d, kBlock, sum);
  if (d < head_dim) multiply_int16<V>(q, ldq, k, d, head_dim - d, sum);
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kPairsKeys<V>) {
      GQA_UNROLL(2)
      for (int c = 0; c < kKeys; c += 2) V::store_pair_sums(s + r * lds + c, sum[r][c]);
    } else if (kKeys == 4) {
      const typename V::I total[4] = {sum[r][0], sum[r][1], sum[r][2 % kKeys], sum[r][3 % kKeys]};
      V::store_sums4(s + r * lds, total);
    } else if (r % 2 == 0) {
      const int next = r + 1 < kRows ? r + 1 : r;
      const typename V::I total[4] = {sum[r][0], sum[r][1], sum[next][0], sum[next][1]};
      V::store_sums2x2(s + r * lds, s + next * lds, total);
    }
  }
}

// o[r, column block] += step[r] * sum over keys of p[r, key] * v[key, column block]; the block is
// kCols vectors wide, `width` numbers of it from V: all of them where kWhole.
template <class V, class S, int kRows, int kCols, bool kWhole = true>
GQA_INLINE void add_int16(const int16_t* p, int64_t ldp, const float* step, const S* const* v,
                          int64_t column, StripKeys keys, int64_t width, float* o, int64_t ldo) {
  using I = typename V::I;
  constexpr int kW = V::kWidth;
  I sum[kRows][kCols];
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(8)
    for (int c = 0; c < kCols; ++c) sum[r][c] = V::zero_integers();
  }
  for (int key = keys.begin / 2 * 2; key < keys.end; key += 2) {
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; c += 2) {
      I x0, x1;
      load_pairs<V>(v[key], v[key + 1], column + c * kW, kWhole ? 2 * kW : width, x0, x1);
      GQA_UNROLL(6)
      for (int r = 0; r < kRows; ++r) {
        const auto weights = V::set_pair(p + r * ldp + key);
        V::add_products(sum[r][c], weights, x0);
        V::add_products(sum[r][c + 1], weights, x1);
      }
    }
  }
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    const typename V::F factor = V::set1(step[r]);
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; c += 2) {
      float* to = o + r * ldo + c * kW;
      typename V::F x0 = V::to_float(sum[r][c]), x1 = V::to_float(sum[r][c + 1]);
      V::template order_pairs<S>(x0, x1);
      V::store(to, V::fma(x0, factor, V::load(to)));
      V::store(to + kW, V::fma(x1, factor, V::load(to + kW)));
    }
  }
}

template <class V, class S, class SV>
class Int16Products : public DirectLoops<Int16Products<V, S, SV>, V, S, SV> {
  using Loops = DirectLoops<Int16Products<V, S, SV>, V, S, SV>;
  friend Loops;

 public:
  static constexpr bool kRoundsProbabilities = true;

  Int16Products(const AttentionParams& params, Tile<V>& tile, bool two_parts)
      : Loops(params, tile), two_parts_(two_parts) {}

  // The factor between the score and the sum of integers.
  float score_step(int r) const { return q_step_[r]; }

  // Before the first tile: converts q to int16, in the order of V::load_int16. q itself becomes
  // those integers too: its sum, which is multiplied with zeros of K, must have the same rounding.
  void begin(int rows) {
    using F = typename V::F;
    const TileLayout<V>& layout = this->tile_.layout;
    for (int r = 0; r < rows; ++r) {
      float* q = this->tile_.q + r * layout.q_ld;
      F most = V::set1(0.0f), bad = most;
      for (int64_t d = 0; d < layout.q_ld; d += kW) {
        most = V::max(V::abs(V::load(q + d)), most);
        bad = V::fma(V::load(q + d), V::set1(0.0f), bad);  // NaN of infinities and NaN
      }
      const Int16Scale scale(V::reduce_max(most) + V::reduce_add(bad),
                             query_steps<V>(this->head_dim_));
      q_step_[r] = scale.step;
      for (int64_t d = 0; d < layout.int16_ld; d += 4 * kW) {
        F x[4], rest[4];
        GQA_UNROLL(4)
        for (int i = 0; i < 4; ++i) {
          float* place = q + d + i * kW;
          const bool there = d + i * kW < layout.q_ld;
          x[i] = there ? V::mul(V::load(place), V::set1(scale.inverse)) : V::set1(0.0f);
          const F whole = V::sub(V::add(x[i], V::set1(kRoundToWhole)), V::set1(kRoundToWhole));
          rest[i] = V::mul(V::sub(x[i], whole), V::set1(1.0f / kSecondPart));
          if (there) V::store(place, two_parts_ ? x[i] : whole);
        }
        store_int16(x, int16_row(0, r) + d);
        if (two_parts_) store_int16(rest, int16_row(1, r) + d);
      }
    }
  }

  void scores(int begin, int rows, const StripKeys* strips) {
    part_ = 0;
    Loops::scores(begin, rows, strips);
    if (!two_parts_) return;
    part_ = 1;
    Loops::scores(begin, rows, strips);
    for (int r = 0; r < rows; ++r) {
      float* s = this->tile_.s + r * this->tile_.layout.keys;
      const float* rest = this->tile_.second_s + r * this->tile_.layout.keys;
      for (int i = strips[0].begin / kW * kW; i < strips[0].end; i += kW) {
        V::store(s + i, V::fma(V::load(rest + i), V::set1(kSecondPart), V::load(s + i)));
      }
    }
  }

  // Converts a row of p, whose largest magnitude is `most`, to int16 in the first half of its
  // memory.
  void round_probabilities(int r, StripKeys keys, float most) {
    float* p = this->tile_.s + r * this->tile_.layout.keys;
    const Int16Scale scale(most, kMostSteps);
    p_step_[r] = scale.step;
    const typename V::F inverse = V::set1(scale.inverse);
    int16_t* integers = reinterpret_cast<int16_t*>(p);
    for (int i = keys.begin / kW * kW; i < keys.end; i += kW) {
      V::store_int16(integers + i, V::mul(V::load(p + i), inverse));
    }
  }

 private:
  static constexpr int kW = V::kWidth;

  // Stores the numbers x of a block in the order of V::load_int16.
  static void store_int16(typename V::F (&x)[4], int16_t* integers) {
    if constexpr (V::kSplitsQueries) {
      V::store_queries(integers, x[0], x[1]);
      return V::store_queries(integers + 2 * kW, x[2], x[3]);
    }
    if (V::template kDeinterleaves<S>) {
      V::deinterleave(x[0], x[1]);
      V::deinterleave(x[2], x[3]);
      std::swap(x[1], x[2]);
    }
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) V::store_int16(integers + i * kW, x[i]);
  }

  int16_t* int16_row(int part, int r) const {
    const TileLayout<V>& layout = this->tile_.layout;
    return this->tile_.q_int16 + (part * layout.rows + r) * layout.int16_ld;
  }

  template <int kRows>
  GQA_NOINLINE void dot_rows(int r, StripKeys keys, Prefetcher<SV>& prefetcher) {
    if (this->head_dim_ == kCommonHeadDim)
      return dot_rows<kRows, kCommonHeadDim>(r, keys, prefetcher);
    dot_rows<kRows, 0>(r, keys, prefetcher);
  }
  // kDims: the head dim, or 0 for any.
  template <int kRows, int kDims>
  GQA_INLINE void dot_rows(int r, StripKeys keys, Prefetcher<SV>& prefetcher) {
    const TileLayout<V>& layout = this->tile_.layout;
    const int64_t dims = kDims ? kDims : this->head_dim_;
    const int64_t ldq = kDims ? kDims : layout.int16_ld;
    const int16_t* q = int16_row(part_, r);
    const S* const* rows = this->k_rows_;
    float* s = (part_ == 0 ? this->tile_.s : this->tile_.second_s) + r * layout.keys;
    const int64_t lds = layout.keys;
    constexpr int kKeys = kRows <= 2 ? 4 : 2;
    for (int i = keys.begin; i < keys.end; i += kKeys) {
      if (i % kRowStep == 0) prefetcher.step();
      dot_int16<V, S, kRows, kKeys>(q, ldq, rows + i, dims, s + i, lds);
    }
  }

  template <int kRows>
  GQA_NOINLINE void add_rows(int r, StripKeys keys, Prefetcher<S>& prefetcher) {
    constexpr int kCols = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
    const int64_t ldp = this->tile_.layout.keys, ldo = this->tile_.layout.o_ld;
    const int64_t dims = this->value_head_dim_;
    const int16_t* p = reinterpret_cast<const int16_t*>(this->tile_.s + r * ldp);
    float* o = this->tile_.o + r * ldo;
    int64_t d = 0;
    for (; d + kCols * kW <= dims; d += kCols * kW) {
      for (int i = 0; i < kCols; ++i) prefetcher.step();
      add_int16<V, SV, kRows, kCols>(p, 2 * ldp, p_step_ + r, this->v_rows_, d, keys, kCols * kW,
                                     o + d, ldo);
    }
    for (; d < dims; d += 2 * kW) {
      prefetcher.step();
      prefetcher.step();
      add_int16<V, SV, kRows, 2, false>(p, 2 * ldp, p_step_ + r, this->v_rows_, d, keys, dims - d,
                                        o + d, ldo);
    }
  }

  bool two_parts_;
  int part_ = 0;  // of q: which one scores are computed from
  float q_step_[kMaxDirectRows], p_step_[kMaxDirectRows];
};

}  // namespace gqa::cpu::GQA_ISA
