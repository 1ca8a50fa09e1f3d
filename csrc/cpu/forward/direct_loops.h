// The loops over rows and keys of direct tasks (decode): which rows and keys are multiplied
// together, and when the next rows of K and V are prefetched. The derived class multiplies:
// products_direct.h floats, products_int16.h 16-bit integers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../isa/isa.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// The same address, hidden from the compiler. It then loads from there again instead of keeping
// values in registers, and addresses neighbours relative to it instead of computing each address.
template <class S>
GQA_INLINE const S* opaque(const S* p) {
  __asm__("" : "+r"(p));
  return p;
}

// The head dim whose loops are unrolled completely.
constexpr int kCommonHeadDim = 128;

// Calls visit(n as a constant) for n from 1 to kStripRows.
template <class Visit>
GQA_INLINE void with_count(int n, Visit visit) {
  switch (n) {
    case 1: return visit(std::integral_constant<int, 1>());
    case 2: return visit(std::integral_constant<int, 2>());
    case 3: return visit(std::integral_constant<int, 3>());
    case 4: return visit(std::integral_constant<int, 4>());
    case 5: return visit(std::integral_constant<int, 5>());
    case 6: return visit(std::integral_constant<int, 6>());
  }
}

// The blocks of rows whose scores are computed together, as equal as can be: a block of few rows
// has few sums to hide the latency of FMA, and still pays for widening K.
inline int num_score_blocks(int rows) { return (rows + kStripRows - 1) / kStripRows; }

// Calls visit(first row, number of rows as a constant) for each of them.
template <class Visit>
GQA_INLINE void for_score_blocks(int rows, Visit visit) {
  for (int r = 0, blocks = num_score_blocks(rows); blocks > 0; --blocks) {
    const int n = (rows - r + blocks - 1) / blocks;
    with_count(n, [&](auto count) { visit(r, count); });
    r += n;
  }
}

// Derived has
//   dot_rows<kRows>(r, keys, prefetcher)  s[r + i, key] = q[r + i] . k[key] for a multiple of
//                                         kRowStep keys; calls prefetcher.step() every kRowStep
//   add_rows<kRows>(r, keys, prefetcher)  o[r + i] += sum over keys of p[r + i, key] * v[key];
//                                         calls prefetcher.step() for every vector of columns
// S, SV: types of K and V. If V::kDeinterleaves<SV>, o holds the even columns of every two vectors before the odd ones.
template <class Derived, class V, class S, class SV>
class DirectLoops {
 public:
  using Probability = float;
  static constexpr float score_step(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr RowBlocks kBlocks{1, kMaxDirectRows};
  static constexpr int kMaxRows = kMaxDirectRows;
  static constexpr int kStrip = kMaxDirectRows;  // all rows share one StripKeys

  DirectLoops(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile), head_dim_(params.head_dim), value_head_dim_(params.value_head_dim) {}

  // After the last tile: restores the order of o's columns.
  void end(int rows) {
    if (!V::template kDeinterleaves<SV>) return;
    for (int r = 0; r < rows; ++r) {
      float* o = tile_.o + r * tile_.layout.o_ld;
      for (int64_t d = 0; d < tile_.layout.o_ld; d += 2 * kW) {
        typename V::F x0 = V::load(o + d), x1 = V::load(o + d + kW);
        V::interleave(x0, x1);
        V::store(o + d, x0);
        V::store(o + d + kW, x1);
      }
    }
  }

  // k_rows: of a whole number of kRowStep keys; next_k_rows: the rows of the tile after this one
  void begin_tile(const S* const* k_rows, const SV* const* v_rows, int, const S* const* next_k_rows,
                  int next_n) {
    k_rows_ = k_rows;
    v_rows_ = v_rows;
    next_k_rows_ = next_k_rows;
    next_n_ = next_n;
  }

  // s = q . k for the keys that are needed; prefetches the tile's V rows
  void scores(int, int rows, const StripKeys* strips) {
    const StripKeys need = strips[0];
    const StripKeys steps{need.begin / kRowStep * kRowStep,
                          (need.end + kRowStep - 1) / kRowStep * kRowStep};
    Prefetcher<SV> prefetcher(v_rows_ + need.begin, need.end - need.begin, value_head_dim_,
                              num_score_blocks(rows) * (steps.end - steps.begin) / kRowStep);
    for_score_blocks(rows, [&](int r, auto count) {
      derived().template dot_rows<count()>(r, steps, prefetcher);
    });
  }

  // o += p . v; prefetches the next tile's K rows
  void accumulate(int, int rows, const StripKeys* strips) {
    const int64_t steps = (rows + kStripRows - 1) / kStripRows * (tile_.layout.o_ld / kW);
    Prefetcher<S> prefetcher(next_k_rows_, next_n_, head_dim_, static_cast<int>(steps));
    for (int r = 0; r < rows; r += kStripRows) {
      const int n = rows - r < kStripRows ? rows - r : kStripRows;
      with_count(
          n, [&](auto count) { derived().template add_rows<count()>(r, strips[0], prefetcher); });
    }
  }

 protected:
  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  const S* const* k_rows_ = nullptr;
  const SV* const* v_rows_ = nullptr;

 private:
  static constexpr int kW = V::kWidth;

  Derived& derived() { return static_cast<Derived&>(*this); }

  const S* const* next_k_rows_ = nullptr;
  int next_n_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
