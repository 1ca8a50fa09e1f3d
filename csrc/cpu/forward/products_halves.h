// Both products of direct tasks in bf16 or fp16 on processors that multiply such numbers and add to
// fp32: K and V are not widened, q and probabilities are rows of the same type. Both are exact in it:
// q was stored so, and p is rounded so by every kernel.
//
//   V::Halves                         a block of numbers: as many as two vectors of floats have
//   V::load_halves(p)                 a block
//   V::add_products(sum, x, y)        sum += x . y, over any lanes
//   V::Weights, V::load_weights(p)    the probabilities of two keys
//   V::load_columns(a, b, x0, x1)     a block of two rows of V, in any order that the next one knows
//   V::add_columns(s0, s1, w, x0, x1) s0, s1 += the rows times w
//   V::order_columns(o)               brings a block of such sums into the columns' order
//
// p . v takes keys two by two. A key without a partner gets a row of zeros, because what lies beyond
// the visible keys may be NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "direct_loops.h"
#include "products_direct.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// Two vectors of numbers of a row at d, of which there are n; then zeros.
template <class V, class S, class Use>
GQA_INLINE void with_block(const S* row, int64_t d, int64_t n, Use use) {
  constexpr int kBlock = 2 * V::kWidth;
  if (n >= kBlock) return use(row + d);
  S block[kBlock] = {};
  std::memcpy(block, row + d, n * sizeof(S));
  use(block);
}

template <class V, class S>
class HalfProducts : public DirectLoops<HalfProducts<V, S>, V, S, S> {
  using Loops = DirectLoops<HalfProducts<V, S>, V, S, S>;
  friend Loops;

 public:
  using Probability = S;  // in the first half of its row of scores

  HalfProducts(const AttentionParams& params, Tile<V>& tile)
      : Loops(params, tile), q_(reinterpret_cast<S*>(tile.q)) {}

  // Converts queries back to S, contiguously at the start of their memory.
  void begin(int rows) {
    const int64_t numbers = rows * this->tile_.layout.q_ld;
    for (int64_t i = 0; i < numbers; i += kW) V::store(q_ + i, V::load(this->tile_.q + i));
  }

  // After the last tile: restores the order of o's columns.
  void end(int rows) {
    for (int64_t i = 0; i < rows * this->tile_.layout.o_ld; i += kBlock) {
      V::order_columns(this->tile_.o + i);
    }
  }

  void begin_tile(const S* const* k_rows, const S* const* v_rows, int n,
                  const S* const* next_k_rows, int next_n) {
    Loops::begin_tile(k_rows, v_rows, n, next_k_rows, next_n);
    next_k_rows_ = next_k_rows;
    next_n_ = next_n;
  }

  // o += p . v; prefetches the next tile's K rows, a few every kRowStep keys: so many columns are
  // computed together that prefetching between them would come in bursts.
  void accumulate(int, int rows, const StripKeys* strips) {
    const StripKeys need = strips[0];
    for (int key = need.begin / 2 * 2; key < need.end + need.end % 2; ++key) {
      const bool there = key >= need.begin && key < need.end;
      pairs_[key] = there ? this->v_rows_[key] : reinterpret_cast<const S*>(kZeroRow.bytes);
    }
    const int64_t width = kW * (rows == 1 ? kDirectColumns<V, 1> : kDirectColumns<V, 2>);
    const int64_t passes = (rows + kStripRows - 1) / kStripRows *
                           (this->value_head_dim_ < width ? 1 : this->value_head_dim_ / width);
    const int64_t steps = passes * ((need.end - need.begin) / kRowStep);
    Prefetcher<S> prefetcher(next_k_rows_, next_n_, this->head_dim_, static_cast<int>(steps));
    for (int r = 0; r < rows; r += kStripRows) {
      const int n = rows - r < kStripRows ? rows - r : kStripRows;
      with_count(n, [&](auto count) { add_rows<count()>(r, need, prefetcher); });
    }
    if (steps == 0) prefetcher.step();
  }

 private:
  static constexpr int kW = V::kWidth;
  static constexpr int kBlock = 2 * kW;

  template <int kRows>
  GQA_NOINLINE void dot_rows(int r, StripKeys keys, Prefetcher<S>& prefetcher) {
    if (this->head_dim_ == kCommonHeadDim)
      return dot_rows<kRows, kCommonHeadDim>(r, keys, prefetcher);
    dot_rows<kRows, 0>(r, keys, prefetcher);
  }
  // kDims: the head dim, or 0 for any.
  template <int kRows, int kDims>
  GQA_INLINE void dot_rows(int r, StripKeys keys, Prefetcher<S>& prefetcher) {
    const TileLayout<V>& layout = this->tile_.layout;
    const int64_t dims = kDims ? kDims : this->head_dim_;
    const int64_t ldq = kDims ? kDims : layout.q_ld;
    const S* q = q_ + r * ldq;
    float* s = this->tile_.s + r * layout.keys;
    constexpr int kKeys = kDirectKeys<V, kRows>;
    for (int i = keys.begin; i < keys.end; i += kKeys) {
      if (i % kRowStep == 0) prefetcher.step();
      dot_keys<kRows, kKeys>(q, ldq, this->k_rows_ + i, dims, s + i, layout.keys);
    }
  }

  template <int kRows, int kKeys>
  static GQA_INLINE void dot_keys(const S* q, int64_t ldq, const S* const* rows, int64_t dims,
                                  float* s, int64_t lds) {
    typename V::F sum[kRows][kKeys];
    const S* k[kKeys];
    q = opaque(q);
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) {
      k[c] = rows[c];
      GQA_UNROLL(6)
      for (int r = 0; r < kRows; ++r) sum[r][c] = V::set1(0.0f);
    }
    int64_t d = 0;
    GQA_UNROLL(8)
    for (; d + kBlock <= dims; d += kBlock) multiply<kRows, kKeys>(q, ldq, k, d, kBlock, sum);
    if (d < dims) multiply<kRows, kKeys>(q, ldq, k, d, dims - d, sum);
    store_dots<V, kRows, kKeys>(sum, s, lds);
  }

  template <int kRows, int kKeys>
  static GQA_INLINE void multiply(const S* q, int64_t ldq, const S* const (&k)[kKeys], int64_t d,
                                  int64_t n, typename V::F (&sum)[kRows][kKeys]) {
    typename V::Halves x[kKeys];
    GQA_UNROLL(4)
    for (int c = 0; c < kKeys; ++c) {
      with_block<V>(k[c], d, n, [&](const S* block) { x[c] = V::load_halves(block); });
    }
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      const typename V::Halves y = V::load_halves(q + r * ldq + d);
      GQA_UNROLL(4)
      for (int c = 0; c < kKeys; ++c) V::add_products(sum[r][c], y, x[c]);
    }
  }

  template <int kRows>
  GQA_NOINLINE void add_rows(int r, StripKeys keys, Prefetcher<S>& prefetcher) {
    constexpr int kCols = kDirectColumns<V, kRows>;
    const int64_t ldp = 2 * this->tile_.layout.keys, ldo = this->tile_.layout.o_ld;
    const int64_t dims = this->value_head_dim_;
    const S* p = reinterpret_cast<const S*>(this->tile_.s) + r * ldp;
    float* o = this->tile_.o + r * ldo;
    int64_t d = 0;
    for (; d + kCols * kW <= dims; d += kCols * kW) {
      add_keys<kRows, kCols>(p, ldp, d, keys, kCols * kW, o + d, ldo, prefetcher);
    }
    for (; d < dims; d += kBlock) {
      add_keys<kRows, 2>(p, ldp, d, keys, dims - d, o + d, ldo, prefetcher);
    }
  }

  // o[r, column block] += sum over keys of p[r, key] * v[key, column block], kCols vectors wide;
  // `width` numbers of it are V's.
  template <int kRows, int kCols>
  GQA_INLINE void add_keys(const S* p, int64_t ldp, int64_t column, StripKeys keys, int64_t width,
                           float* o, int64_t ldo, Prefetcher<S>& prefetcher) const {
    typename V::F sum[kRows][kCols];
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      GQA_UNROLL(8)
      for (int c = 0; c < kCols; ++c) sum[r][c] = V::load(o + r * ldo + c * kW);
    }
    for (int key = keys.begin / 2 * 2; key < keys.end; key += 2) {
      if (key % kRowStep == 0) prefetcher.step();
      GQA_UNROLL(4)
      for (int c = 0; c < kCols; c += 2) {
        typename V::Halves x0, x1;
        const int64_t at = column + c * kW, n = width - c * kW;
        with_block<V>(pairs_[key], at, n, [&](const S* a) {
          with_block<V>(pairs_[key + 1], at, n, [&](const S* b) { V::load_columns(a, b, x0, x1); });
        });
        GQA_UNROLL(6)
        for (int r = 0; r < kRows; ++r) {
          V::add_columns(sum[r][c], sum[r][c + 1], V::load_weights(p + r * ldp + key), x0, x1);
        }
      }
    }
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      GQA_UNROLL(8)
      for (int c = 0; c < kCols; ++c) V::store(o + r * ldo + c * kW, sum[r][c]);
    }
  }

  S* q_;  // [rows, q_ld]
  const S* const* next_k_rows_ = nullptr;
  int next_n_ = 0;
  const S* pairs_[kMaxTileKeys + 2];  // of V
};

}  // namespace gqa::cpu::GQA_ISA
