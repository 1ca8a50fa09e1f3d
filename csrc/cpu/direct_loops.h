// The loops of the two products of a tile with few rows (decode): which rows and keys are taken
// together, and when the next rows of K and V are asked for. What is done with them is the derived
// class's: products_direct.h multiplies floats, products_integer.h integers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// The same address, of which compilers know nothing: what lies there is loaded again in place of
// being kept in a register, and places beside it are counted from it in place of getting addresses
// of their own.
template <class S>
GQA_INLINE const S* again(const S* p) {
  __asm__("" : "+r"(p));
  return p;
}

// The head dim whose loops are unrolled whole.
constexpr int kUsualDims = 128;

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
//   dot_rows<kRows>(r, keys, ahead)  s[r + i, key] = q[r + i] . k[key], a whole number of kRowStep
//                                    keys, calling ahead.step() for every kRowStep
//   add_rows<kRows>(r, keys, ahead)  o[r + i] += sum over keys of p[r + i, key] * v[key], calling
//                                    ahead.step() for every vector of columns
// and leaves o, where V::kSplits<S>, with even and odd columns of every two vectors apart.
template <class Derived, class V, class S>
class DirectLoops {
 public:
  using Probability = float;
  static constexpr float score_unit(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr RowBlocks kBlocks{1, kMaxDirectRows};
  static constexpr int kMaxRows = kMaxDirectRows;
  static constexpr int kStrip = kMaxDirectRows;  // all rows share one StripKeys

  DirectLoops(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile), head_dim_(params.head_dim), value_head_dim_(params.value_head_dim) {}

  // After the last tile: o in its own order again.
  void end(int rows) {
    if (!V::template kSplits<S>) return;
    for (int r = 0; r < rows; ++r) {
      float* o = tile_.o + r * tile_.layout.o_ld;
      for (int64_t d = 0; d < tile_.layout.o_ld; d += 2 * kW) {
        typename V::F x0 = V::load(o + d), x1 = V::load(o + d + kW);
        V::join(x0, x1);
        V::store(o + d, x0);
        V::store(o + d + kW, x1);
      }
    }
  }

  // k_rows: of a whole number of kRowStep keys; next_k_rows: the rows of the tile after this one
  void begin_tile(const S* const* k_rows, const S* const* v_rows, int, const S* const* next_k_rows,
                  int next_n) {
    k_rows_ = k_rows;
    v_rows_ = v_rows;
    next_k_rows_ = next_k_rows;
    next_n_ = next_n;
  }

  // s = q . k for the keys that are needed; asks for the tile's V rows
  void scores(int, int rows, const StripKeys* strips) {
    const StripKeys need = strips[0];
    const StripKeys steps{need.begin / kRowStep * kRowStep,
                          (need.end + kRowStep - 1) / kRowStep * kRowStep};
    Prefetcher<S> ahead(v_rows_ + need.begin, need.end - need.begin, value_head_dim_,
                        num_score_blocks(rows) * (steps.end - steps.begin) / kRowStep);
    for_score_blocks(
        rows, [&](int r, auto count) { derived().template dot_rows<count()>(r, steps, ahead); });
  }

  // o += p . v; asks for the next tile's K rows
  void accumulate(int, int rows, const StripKeys* strips) {
    const int64_t steps = (rows + kStripRows - 1) / kStripRows * (tile_.layout.o_ld / kW);
    Prefetcher<S> ahead(next_k_rows_, next_n_, head_dim_, static_cast<int>(steps));
    for (int r = 0; r < rows; r += kStripRows) {
      const int n = rows - r < kStripRows ? rows - r : kStripRows;
      with_count(n, [&](auto count) { derived().template add_rows<count()>(r, strips[0], ahead); });
    }
  }

 protected:
  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  const S* const* k_rows_ = nullptr;
  const S* const* v_rows_ = nullptr;

 private:
  static constexpr int kW = V::kWidth;

  Derived& derived() { return static_cast<Derived&>(*this); }

  const S* const* next_k_rows_ = nullptr;
  int next_n_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
