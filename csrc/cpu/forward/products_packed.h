// Both products of tasks with many rows: K and V are widened to fp32 and packed once, into panels
// that a register-blocked micro-kernel streams through (6 rows x 2 vectors: 12 sums, 2 loads and 6
// broadcasts per 12 FMAs). A strip is those 6 rows.
#pragma once

#include <cstdint>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// What becomes of the sums of a strip: they replace c, continue the sums in c, or are added to c when
// they are complete.
enum class Sums { kReplace, kContinue, kAdd };

// c[6, kPanel] from a[6, depth] * b[depth, kPanel]
template <class V, Sums kSums>
GQA_INLINE void multiply_strip(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                               int64_t ldc) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F sum[kStripRows][2];
  GQA_UNROLL(6)
  for (int r = 0; r < kStripRows; ++r) {
    constexpr bool kContinue = kSums == Sums::kContinue;
    sum[r][0] = kContinue ? V::load(c + r * ldc) : V::set1(0.0f);
    sum[r][1] = kContinue ? V::load(c + r * ldc + kW) : V::set1(0.0f);
  }
  for (int64_t i = 0; i < depth; ++i) {
    const F b0 = V::load(b + i * 2 * kW);
    const F b1 = V::load(b + i * 2 * kW + kW);
    GQA_UNROLL(6)
    for (int r = 0; r < kStripRows; ++r) {
      const F x = V::set1(a[r * lda + i]);
      sum[r][0] = V::fma(x, b0, sum[r][0]);
      sum[r][1] = V::fma(x, b1, sum[r][1]);
    }
  }
  GQA_UNROLL(6)
  for (int r = 0; r < kStripRows; ++r) {
    if (kSums == Sums::kAdd) {
      sum[r][0] = V::add(V::load(c + r * ldc), sum[r][0]);
      sum[r][1] = V::add(V::load(c + r * ldc + kW), sum[r][1]);
    }
    V::store(c + r * ldc, sum[r][0]);
    V::store(c + r * ldc + kW, sum[r][1]);
  }
}

// Products that are summed one after another. The rounding error of a longer sum would grow with
// its length, so sums of so many are added up.
constexpr int64_t kDotDims = 128;

// c[6, kPanel] = a[6, dims] * b[dims, kPanel]
template <class V>
GQA_INLINE void dot_strip(const float* a, int64_t lda, const float* b, int64_t dims, float* c,
                          int64_t ldc) {
  multiply_strip<V, Sums::kReplace>(a, lda, b, dims < kDotDims ? dims : kDotDims, c, ldc);
  for (int64_t d = kDotDims; d < dims; d += kDotDims) {
    const int64_t n = dims - d < kDotDims ? dims - d : kDotDims;
    multiply_strip<V, Sums::kAdd>(a + d, lda, b + d * 2 * V::kWidth, n, c, ldc);
  }
}

// panels[row / kPanel][d][row % kPanel] = rows[row][d], widened; rows from n to the panel's end are
// zeros. For products whose sums run over d.
template <class V, class T>
inline void pack_transposed(const T* const* rows, int n, int64_t dims, float* panels) {
  constexpr int kW = V::kWidth;
  constexpr int kPanel = TileLayout<V>::kPanel;
  for (int row = 0; row < n; row += kW) {
    float* panel = panels + row / kPanel * kPanel * dims + row % kPanel;
    for (int64_t d = 0; d < dims; d += kW) {
      const int64_t width = dims - d < kW ? dims - d : kW;
      typename V::F x[kW];
      GQA_UNROLL(16)
      for (int i = 0; i < kW; ++i) {
        x[i] = V::set1(0.0f);
        if (row + i < n) {
          const T* from = at(rows[row + i], d);
          x[i] = width == kW ? V::load(from) : load_partial<V>(from, width);
        }
      }
      V::transpose(x);
      for (int64_t i = 0; i < width; ++i) V::store(panel + (d + i) * kPanel, x[i]);
    }
  }
  if (n % kPanel != 0 && n % kPanel <= kW) {  // the panel's second half
    float* panel = panels + n / kPanel * kPanel * dims + kW;
    for (int64_t d = 0; d < dims; ++d) V::store(panel + d * kPanel, V::set1(0.0f));
  }
}

// panels[d / kPanel][row][d % kPanel] = rows[row][d], widened; columns from dims to the panel's end
// are zeros. A panel has room for max_rows rows. For products whose sums run over the rows.
template <class V, class T>
inline void pack_rows(const T* const* rows, int n, int64_t dims, int64_t max_rows, float* panels) {
  constexpr int kW = V::kWidth;
  constexpr int kPanel = TileLayout<V>::kPanel;
  const int64_t panel_floats = max_rows * kPanel;
  for (int row = 0; row < n; ++row) {
    float* to = panels + row * kPanel;
    for (int64_t d = 0; d < round_up(dims, kPanel); d += kW) {
      typename V::F x = V::set1(0.0f);
      if (d + kW <= dims) {
        x = V::load(at(rows[row], d));
      } else if (d < dims) {
        x = load_partial<V>(at(rows[row], d), dims - d);
      }
      V::store(to + d / kPanel * panel_floats + d % kPanel, x);
    }
  }
}

template <class V, class S, class SV = S>
class PackedProducts {
 public:
  using Probability = float;
  static constexpr float score_step(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr RowBlocks kBlocks{kStripRows, kMaxTileRows};
  static constexpr int kMaxRows = kMaxTileRows;
  static constexpr int kStrip = kStripRows;  // rows that share one StripKeys

  PackedProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile), head_dim_(params.head_dim), value_head_dim_(params.value_head_dim) {}

  void begin(int) {}
  void end(int) {}

  void begin_tile(const S* const* k_rows, const SV* const* v_rows, int n, const S* const*, int) {
    pack_transposed<V>(k_rows, n, head_dim_, tile_.k_panels);
    pack_rows<V>(v_rows, n, value_head_dim_, tile_.layout.keys, tile_.v_panels);
    num_keys_ = n;
  }

  // s = q . k for the keys each strip needs
  void scores(int, int rows, const StripKeys* strips) {
    const int64_t ld = tile_.layout.keys;
    for (int key = 0; key < num_keys_; key += kPanel) {
      const float* panel = tile_.k_panels + key * head_dim_;
      for (int r = 0; r < rows; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (key + kPanel <= need.begin || key >= need.end) continue;
        dot_strip<V>(tile_.q + r * tile_.layout.q_ld, tile_.layout.q_ld, panel, head_dim_,
                     tile_.s + r * ld + key, ld);
      }
    }
  }

  // o += p . v
  void accumulate(int, int rows, const StripKeys* strips) {
    const int64_t ld = tile_.layout.keys;
    for (int64_t col = 0; col < tile_.layout.o_ld; col += kPanel) {
      const float* panel = tile_.v_panels + col * ld;
      for (int r = 0; r < rows; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (need.begin >= need.end) continue;
        multiply_strip<V, Sums::kContinue>(
            tile_.s + r * ld + need.begin, ld, panel + need.begin * kPanel, need.end - need.begin,
            tile_.o + r * tile_.layout.o_ld + col, tile_.layout.o_ld);
      }
    }
  }

 private:
  static constexpr int kW = V::kWidth;
  static constexpr int kPanel = TileLayout<V>::kPanel;

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  int num_keys_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
