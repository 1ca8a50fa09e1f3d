// Both products of direct tasks (decode) in fp32: K and V are read in place, row after row, and
// widened in registers. The next rows are prefetched during the arithmetic.
//
// Rows are read in blocks of two vectors. Some types are cheaper to widen into the even and the odd
// numbers of a block than in order (V::kDeinterleaves). For those, q is permuted to that order
// before the first tile, and o back after the last.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "direct_loops.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// The `n` numbers of `row` from d on, at most two vectors, then zeros.
template <class V, class S>
GQA_INLINE void load_block(const S* row, int64_t d, int64_t n, typename V::F& x0,
                           typename V::F& x1) {
  if (n >= 2 * V::kWidth) return V::load_block(at(row, d), x0, x1);
  if constexpr (V::template kMasks<S>) {
    V::load_block_first(at(row, d), n, x0, x1);
  } else {
    S block[2 * V::kWidth / kNumbersPerElement<S>] = {};
    std::memcpy(block, at(row, d), n * sizeof(S) / kNumbersPerElement<S>);
    V::load_block(block, x0, x1);
  }
}

template <class S>
inline constexpr bool kWidens = !std::is_same_v<S, float>;

// sum[r, c] += q[r] . x[c], a vector of each.
template <class V, int kRows, int kKeys>
GQA_INLINE void multiply_vectors(const float* q, int64_t ldq, typename V::F (&x)[kKeys],
                                 typename V::F (&sum)[kRows][kKeys]) {
  // Without this, compilers load and widen again for every use.
  GQA_UNROLL(4)
  for (int c = 0; c < kKeys; ++c) V::pin(x[c]);
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    typename V::F y = V::load(q + r * ldq);
    if (kRows > 2) V::pin(y);
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) sum[r][c] = V::fma(y, x[c], sum[r][c]);
  }
}

// sum[., r, c] += q[r] . k[c] over the block of numbers at d, of which there are n.
template <class V, class S, int kChains, int kRows, int kKeys>
GQA_INLINE void multiply_block(const float* q, int64_t ldq, const S* const (&k)[kKeys], int64_t d,
                               int64_t n, typename V::F (&sum)[kChains][kRows][kKeys]) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F x[kKeys], x1[kKeys];
  // One vector at a time if that costs no extra instruction, or if many rows leave no registers for
  // two.
  constexpr bool kByParts = kRows > 4 || (kWidens<S> && !V::template kDeinterleaves<S>);
  if (kByParts && n >= 2 * kW) {
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) x[c] = V::template load_part<0>(at(k[c], d));
    multiply_vectors<V>(q + d, ldq, x, sum[0]);
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) x[c] = V::template load_part<1>(opaque(at(k[c], d)));
    multiply_vectors<V>(q + d + kW, ldq, x, sum[1 % kChains]);
  } else {
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) load_block<V>(k[c], d, n, x[c], x1[c]);
    multiply_vectors<V>(q + d, ldq, x, sum[0]);
    multiply_vectors<V>(q + d + kW, ldq, x1, sum[1 % kChains]);
  }
}

// s[r, 0..kKeys) = the sums of the lanes of sum[r]
template <class V, int kRows, int kKeys>
GQA_INLINE void store_dots(const typename V::F (&sum)[kRows][kKeys], float* s, int64_t lds) {
  using F = typename V::F;
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    if (kKeys == 4) {
      F total[4];
      GQA_UNROLL(4)
      for (int c = 0; c < 4; ++c) total[c] = sum[r][c % kKeys];
      V::store_sums4(s + r * lds, total);
    } else if (r % 2 == 0) {
      const int next = r + 1 < kRows ? r + 1 : r;
      const F total[4] = {sum[r][0], sum[r][1], sum[next][0], sum[next][1]};
      V::store_sums2x2(s + r * lds, s + next * lds, total);
    }
  }
}

// s[r, 0..kKeys) = q[r] . rows[0..kKeys)
template <class V, class S, int kRows, int kKeys>
GQA_INLINE void dot_keys(const float* q, int64_t ldq, const S* const* rows, int64_t head_dim,
                         float* s, int64_t lds) {
  using F = typename V::F;
  q = opaque(q);
  const S* k[kKeys];
  GQA_UNROLL(4)
  for (int c = 0; c < kKeys; ++c) k[c] = rows[c];
  constexpr int kBlock = 2 * V::kWidth;
  // One row, or three by two keys, have too few sums to hide the latency of FMA, so the two vectors
  // of a block get sums of their own. (Three rows of fp32 would need more than 16 registers.)
  constexpr int kChains = kRows == 1 || (kRows == 3 && kKeys == 2 && kWidens<S>) ? 2 : 1;
  F sum[kChains][kRows][kKeys];
  GQA_UNROLL(2)
  for (int i = 0; i < kChains; ++i) {
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      GQA_UNROLL(4)
      for (int c = 0; c < kKeys; ++c) sum[i][r][c] = V::set1(0.0f);
    }
  }
  int64_t d = 0;
  GQA_UNROLL(8)
  for (; d + kBlock <= head_dim; d += kBlock) multiply_block<V>(q, ldq, k, d, kBlock, sum);
  if (d < head_dim) multiply_block<V>(q, ldq, k, d, head_dim - d, sum);
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys && kChains == 2; ++c) {
      sum[0][r][c] = V::add(sum[0][r][c], sum[kChains - 1][r][c]);
    }
  }
  store_dots<V, kRows, kKeys>(sum[0], s, lds);
}

// o[r, column block] += sum over keys of p[r, key] * v[key, column block]; the block is kCols
// vectors wide, `width` numbers of it from V: all of them where kWhole.
template <class V, class S, int kRows, int kCols, bool kWhole = true>
GQA_INLINE void add_keys(const float* p, int64_t ldp, const S* const* v, int64_t column,
                         StripKeys keys, int64_t width, float* o, int64_t ldo) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F sum[kRows][kCols];
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(8)
    for (int c = 0; c < kCols; ++c) sum[r][c] = V::load(o + r * ldo + c * kW);
  }
  for (int key = keys.begin; key < keys.end; ++key) {
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; c += 2) {
      F x0, x1;
      load_block<V>(v[key], column + c * kW, kWhole ? 2 * kW : width, x0, x1);
      GQA_UNROLL(6)
      for (int r = 0; r < kRows; ++r) {
        const F weight = V::set1(p[r * ldp + key]);
        sum[r][c] = V::fma(weight, x0, sum[r][c]);
        sum[r][c + 1] = V::fma(weight, x1, sum[r][c + 1]);
      }
    }
  }
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(8)
    for (int c = 0; c < kCols; ++c) V::store(o + r * ldo + c * kW, sum[r][c]);
  }
}

// Keys whose products with kRows rows are summed together: as many sums as hide the latency of FMA
// and fit in registers.
template <class V, int kRows>
inline constexpr int kDirectKeys = kRows <= 2 || kRows * 4 <= V::kSums ? 4 : 2;
// Vectors of columns likewise.
template <class V, int kRows>
inline constexpr int kDirectColumns = kRows == 1                            ? 8
                                      : kRows == 2 || kRows * 4 <= V::kSums ? 4
                                                                            : 2;

// s[r, key] = q[r] . k_rows[key] for at most kMaxDirectRows rows, summed in the order of
// DirectProducts, for the backward. q's rows end with zeros up to two whole vectors; k_rows has a
// whole number of kRowStep keys.
template <class V, class S>
inline void direct_scores(const float* q, int64_t ldq, int rows, const S* const* k_rows,
                          StripKeys keys, int64_t head_dim, float* s, int64_t lds) {
  static_assert(!V::template kDeinterleaves<S>, "q would have to be split first");
  const int begin = keys.begin / kRowStep * kRowStep;
  for_score_blocks(rows, [&](int r, auto count) {
    constexpr int kRows = count(), kKeys = kDirectKeys<V, kRows>;
    for (int i = begin; i < keys.end; i += kKeys) {
      dot_keys<V, S, kRows, kKeys>(q + r * ldq, ldq, k_rows + i, head_dim, s + r * lds + i, lds);
    }
  });
}

template <class V, class S, class SV = S>
class DirectProducts : public DirectLoops<DirectProducts<V, S, SV>, V, S, SV> {
  using Loops = DirectLoops<DirectProducts<V, S, SV>, V, S, SV>;
  friend Loops;

 public:
  using Loops::Loops;

  // Before the first tile: permutes q to the order of load_block.
  void begin(int rows) {
    if (!V::template kDeinterleaves<S>) return;
    for (int r = 0; r < rows; ++r) {
      float* q = this->tile_.q + r * this->tile_.layout.q_ld;
      for (int64_t d = 0; d < this->tile_.layout.q_ld; d += 2 * kW) {
        typename V::F x0 = V::load(q + d), x1 = V::load(q + d + kW);
        V::deinterleave(x0, x1);
        V::store(q + d, x0);
        V::store(q + d + kW, x1);
      }
    }
  }

 private:
  static constexpr int kW = V::kWidth;

  // This and add_rows are functions of their own: if all were inlined into one, gcc would store the
  // widened numbers of every block to memory that nobody reads.
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
    const int64_t ldq = kDims ? kDims : layout.q_ld, lds = layout.keys;
    const float* q = this->tile_.q + r * ldq;
    const S* const* rows = this->k_rows_;
    float* s = this->tile_.s + r * lds;
    constexpr int kKeys = kDirectKeys<V, kRows>;
    for (int i = keys.begin; i < keys.end; i += kKeys) {
      if (i % kRowStep == 0) prefetcher.step();
      dot_keys<V, S, kRows, kKeys>(q, ldq, rows + i, dims, s + i, lds);
    }
  }

  template <int kRows>
  GQA_NOINLINE void add_rows(int r, StripKeys keys, Prefetcher<S>& prefetcher) {
    constexpr int kCols = kDirectColumns<V, kRows>;
    const int64_t ldp = this->tile_.layout.keys, ldo = this->tile_.layout.o_ld;
    const int64_t dims = this->value_head_dim_;
    const float* p = this->tile_.s + r * ldp;
    float* o = this->tile_.o + r * ldo;
    int64_t d = 0;
    for (; d + kCols * kW <= dims; d += kCols * kW) {
      for (int i = 0; i < kCols; ++i) prefetcher.step();
      add_keys<V, SV, kRows, kCols>(p, ldp, this->v_rows_, d, keys, kCols * kW, o + d, ldo);
    }
    for (; d < dims; d += 2 * kW) {
      prefetcher.step();
      prefetcher.step();
      add_keys<V, SV, kRows, 2, false>(p, ldp, this->v_rows_, d, keys, dims - d, o + d, ldo);
    }
  }
};

}  // namespace gqa::cpu::GQA_ISA
