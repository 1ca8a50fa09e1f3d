// The two matrix products of a tile with few rows (decode): K and V are read where they lie, row
// after row, and widened in registers. The next rows are prefetched during the arithmetic.
#pragma once

#include <cstdint>

#include "isa.h"
#include "kv_rows.h"
#include "math.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// s[r, 0..3] = q[r] . k[0..3]
template <class V, class T, int kRows>
GQA_INLINE void dot_4_keys(const float* q, int64_t ldq, const T* const (&k)[4], int64_t head_dim,
                           float* s, int64_t lds) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F sum[kRows][4];
  GQA_UNROLL(3)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(4)
    for (int c = 0; c < 4; ++c) sum[r][c] = V::set1(0.0f);
  }
  int64_t d = 0;
  for (; d + kW <= head_dim; d += kW) {
    GQA_UNROLL(4)
    for (int c = 0; c < 4; ++c) {
      const F x = V::load(k[c] + d);
      GQA_UNROLL(3)
      for (int r = 0; r < kRows; ++r) sum[r][c] = V::fma(V::load(q + r * ldq + d), x, sum[r][c]);
    }
  }
  if (d < head_dim) {
    for (int c = 0; c < 4; ++c) {
      const F x = load_partial<V>(k[c] + d, head_dim - d);
      for (int r = 0; r < kRows; ++r) sum[r][c] = V::fma(V::load(q + r * ldq + d), x, sum[r][c]);
    }
  }
  GQA_UNROLL(3)
  for (int r = 0; r < kRows; ++r) V::store_sums4(s + r * lds, sum[r]);
}

// o[r, column block] += sum over keys of p[r, key] * v[key, column block]; the block is kCols
// vectors wide, the last of them `last` elements (fewer than a vector only where kCols is 1).
template <class V, class T, int kRows, int kCols>
GQA_INLINE void add_keys(const float* p, int64_t ldp, const T* const* v, int64_t column,
                         StripKeys keys, int64_t last, float* o, int64_t ldo) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F sum[kRows][kCols];
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; ++c) sum[r][c] = V::load(o + r * ldo + c * kW);
  }
  for (int key = keys.begin; key < keys.end; ++key) {
    const T* row = v[key] + column;
    F x[kCols];
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; ++c) {
      x[c] = kCols > 1 || last == kW ? V::load(row + c * kW) : load_partial<V>(row, last);
    }
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      const F weight = V::set1(p[r * ldp + key]);
      GQA_UNROLL(4)
      for (int c = 0; c < kCols; ++c) sum[r][c] = V::fma(weight, x[c], sum[r][c]);
    }
  }
  GQA_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    GQA_UNROLL(4)
    for (int c = 0; c < kCols; ++c) V::store(o + r * ldo + c * kW, sum[r][c]);
  }
}

template <class V, class T>
class DirectProducts {
 public:
  static constexpr int kStrip = kMaxDirectRows;  // all rows share one StripKeys

  DirectProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile), head_dim_(params.head_dim), value_head_dim_(params.value_head_dim) {}

  // next_k_rows: the rows of the tile after this one
  void begin_tile(const T* const* k_rows, const T* const* v_rows, int n,
                  const T* const* next_k_rows, int next_n) {
    k_rows_ = k_rows;
    v_rows_ = v_rows;
    num_keys_ = n;
    next_k_rows_ = next_k_rows;
    next_n_ = next_n;
  }

  // s = q . k for the keys that are needed; asks for the tile's V rows
  void scores(int rows, const StripKeys* strips) {
    const StripKeys need = strips[0];
    const int first = need.begin / 4 * 4;
    Prefetcher<T> ahead(v_rows_ + need.begin, need.end - need.begin, value_head_dim_,
                        (need.end - first + 3) / 4);
    for (int key = first; key < need.end; key += 4) {
      ahead.step();
      const T* k[4];
      for (int c = 0; c < 4; ++c) k[c] = k_rows_[key + c < num_keys_ ? key + c : num_keys_ - 1];
      int r = 0;
      for (; rows - r > 4 || rows - r == 3; r += 3) dot_rows<3>(r, k, key);
      for (; rows - r >= 2; r += 2) dot_rows<2>(r, k, key);
      if (r < rows) dot_rows<1>(r, k, key);
    }
  }

  // o += p . v; asks for the next tile's K rows
  void accumulate(int rows, const StripKeys* strips) {
    const int64_t steps = (rows + kStripRows - 1) / kStripRows * (tile_.layout.o_ld / kW);
    Prefetcher<T> ahead(next_k_rows_, next_n_, head_dim_, static_cast<int>(steps));
    int r = 0;
    for (; rows - r > kStripRows; r += kStripRows) add_rows<kStripRows>(r, strips[0], ahead);
    switch (rows - r) {
      case 1: return add_rows<1>(r, strips[0], ahead);
      case 2: return add_rows<2>(r, strips[0], ahead);
      case 3: return add_rows<3>(r, strips[0], ahead);
      case 4: return add_rows<4>(r, strips[0], ahead);
      case 5: return add_rows<5>(r, strips[0], ahead);
      case 6: return add_rows<6>(r, strips[0], ahead);
    }
  }

 private:
  static constexpr int kW = V::kWidth;

  template <int kRows>
  void dot_rows(int r, const T* const (&k)[4], int key) {
    const TileLayout<V>& layout = tile_.layout;
    dot_4_keys<V, T, kRows>(tile_.q + r * layout.q_ld, layout.q_ld, k, head_dim_,
                            tile_.s + r * layout.keys + key, layout.keys);
  }

  template <int kRows>
  void add_rows(int r, StripKeys keys, Prefetcher<T>& ahead) {
    constexpr int kCols =
        kRows <= 2 ? 4 : 2;  // 4 to 12 sums: as many as hide the latency of FMA and fit
    const int64_t ldp = tile_.layout.keys, ldo = tile_.layout.o_ld;
    const float* p = tile_.s + r * ldp;
    float* o = tile_.o + r * ldo;
    int64_t d = 0;
    for (; d + kCols * kW <= value_head_dim_; d += kCols * kW) {
      for (int i = 0; i < kCols; ++i) ahead.step();
      add_keys<V, T, kRows, kCols>(p, ldp, v_rows_, d, keys, kW, o + d, ldo);
    }
    for (; d < value_head_dim_; d += kW) {
      ahead.step();
      const int64_t last = value_head_dim_ - d < kW ? value_head_dim_ - d : kW;
      add_keys<V, T, kRows, 1>(p, ldp, v_rows_, d, keys, last, o + d, ldo);
    }
  }

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  const T* const* k_rows_ = nullptr;
  const T* const* v_rows_ = nullptr;
  const T* const* next_k_rows_ = nullptr;
  int num_keys_ = 0, next_n_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
