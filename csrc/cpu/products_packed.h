// The two matrix products of a tile with many rows: K and V are packed once, widened to fp32, into
// panels that a register-blocked micro-kernel streams through (6 rows x 2 vectors: 12 sums, 2 loads
// and 6 broadcasts per 12 FMAs).
#pragma once

#include <cstdint>

#include "isa.h"
#include "kv_rows.h"
#include "math.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

// c[6, kPanel] (+)= a[6, depth] * b[depth, kPanel]
template <class V, bool kAdd>
GQA_INLINE void multiply_strip(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                               int64_t ldc) {
  using F = typename V::F;
  constexpr int kW = V::kWidth;
  F sum[kStripRows][2];
  GQA_UNROLL(6)
  for (int r = 0; r < kStripRows; ++r) {
    sum[r][0] = kAdd ? V::load(c + r * ldc) : V::set1(0.0f);
    sum[r][1] = kAdd ? V::load(c + r * ldc + kW) : V::set1(0.0f);
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
    V::store(c + r * ldc, sum[r][0]);
    V::store(c + r * ldc + kW, sum[r][1]);
  }
}

template <class V, class S>
class PackedProducts {
 public:
  static constexpr int kStrip = kStripRows;  // rows that share one StripKeys

  PackedProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile), head_dim_(params.head_dim), value_head_dim_(params.value_head_dim) {}

  void begin(int) {}
  void end(int) {}

  void begin_tile(const S* const* k_rows, const S* const* v_rows, int n, const S* const*, int) {
    pack_k(k_rows, n);
    pack_v(v_rows, n);
    num_keys_ = n;
  }

  // s = q . k for the keys each strip needs
  void scores(int rows, const StripKeys* strips) {
    const int64_t ld = tile_.layout.keys;
    for (int key = 0; key < num_keys_; key += kPanel) {
      const float* panel = tile_.k_panels + key * head_dim_;
      for (int r = 0; r < rows; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (key + kPanel <= need.begin || key >= need.end) continue;
        multiply_strip<V, false>(tile_.q + r * tile_.layout.q_ld, tile_.layout.q_ld, panel,
                                 head_dim_, tile_.s + r * ld + key, ld);
      }
    }
  }

  // o += p . v
  void accumulate(int rows, const StripKeys* strips) {
    const int64_t ld = tile_.layout.keys;
    for (int64_t col = 0; col < tile_.layout.o_ld; col += kPanel) {
      const float* panel = tile_.v_panels + col * ld;
      for (int r = 0; r < rows; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (need.begin >= need.end) continue;
        multiply_strip<V, true>(tile_.s + r * ld + need.begin, ld, panel + need.begin * kPanel,
                                need.end - need.begin, tile_.o + r * tile_.layout.o_ld + col,
                                tile_.layout.o_ld);
      }
    }
  }

 private:
  static constexpr int kW = V::kWidth;
  static constexpr int kPanel = TileLayout<V>::kPanel;

  // k_panels[key / kPanel][d][key % kPanel]; keys from n to the panel's end are zeros.
  void pack_k(const S* const* rows, int n) {
    for (int key = 0; key < n; key += kW) {
      float* panel = tile_.k_panels + key / kPanel * kPanel * head_dim_ + key % kPanel;
      for (int64_t d = 0; d < head_dim_; d += kW) {
        const int64_t dims = head_dim_ - d < kW ? head_dim_ - d : kW;
        typename V::F x[kW];
        GQA_UNROLL(8)
        for (int i = 0; i < kW; ++i) {
          x[i] = V::set1(0.0f);
          if (key + i < n) {
            const S* from = at(rows[key + i], d);
            x[i] = dims == kW ? V::load(from) : load_partial<V>(from, dims);
          }
        }
        V::transpose(x);
        for (int64_t i = 0; i < dims; ++i) V::store(panel + (d + i) * kPanel, x[i]);
      }
    }
    if (n % kPanel != 0 && n % kPanel <= kW) {  // the panel's second half
      float* panel = tile_.k_panels + n / kPanel * kPanel * head_dim_ + kW;
      for (int64_t d = 0; d < head_dim_; ++d) V::store(panel + d * kPanel, V::set1(0.0f));
    }
  }

  // v_panels[d / kPanel][key][d % kPanel]; columns from Dv to the panel's end are zeros.
  void pack_v(const S* const* rows, int n) {
    const int64_t panel_floats = tile_.layout.keys * kPanel;
    for (int key = 0; key < n; ++key) {
      float* to = tile_.v_panels + key * kPanel;
      for (int64_t d = 0; d < tile_.layout.o_ld; d += kW) {
        typename V::F x = V::set1(0.0f);
        if (d + kW <= value_head_dim_) {
          x = V::load(at(rows[key], d));
        } else if (d < value_head_dim_) {
          x = load_partial<V>(at(rows[key], d), value_head_dim_ - d);
        }
        V::store(to + d / kPanel * panel_floats + d % kPanel, x);
      }
    }
  }

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  int num_keys_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
