// Both products of direct tasks (decode) on AMX tiles, in bf16: K and V are read in place.
//
//   s^T = k . q^T   16 keys, as their rows lie, are a tile; the rows of the task are its columns
//   o   = p . v     16 rows of V are a tile. The product expects two keys of one column in a dword,
//                   but the dwords of V hold two columns of one key. With p in the lower halves of
//                   its dwords and 0 in the upper ones, the product is the even columns; with p in
//                   the upper halves, the odd ones. An fp32 probability rounded to bf16 already has
//                   the latter form.
//
// These are twice the products, but a product is 8192 multiply-adds in 16 cycles, and memory limits
// decode. o has the even columns of each 32 before the odd ones, as in products_direct.h.
//
// A tile needs rows at one distance and whole runs of 32 numbers. Others (at the end of a page or
// of the keys, other head dims) are copied first.
#pragma once

#include <cstdint>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "../limits.h"
#include "engine_amx.h"
#include "kv_rows.h"
#include "pairs.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V>
class AmxDirectProducts {
 public:
  using Probability = float;
  static constexpr float score_step(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr RowBlocks kBlocks{16, kMaxDirectRows};
  static constexpr int kMaxRows = kMaxDirectRows;
  static constexpr int kStrip = kMaxDirectRows;  // all rows share one StripKeys

  AmxDirectProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile),
        head_dim_(params.head_dim),
        value_head_dim_(params.value_head_dim),
        copies_(reinterpret_cast<BFloat16*>(tile.k_panels)),
        v_copies_(reinterpret_cast<BFloat16*>(tile.v_panels)),
        low_(tile.s + kMaxDirectRows * tile.layout.keys) {}

  // q^T in tiles: dword n of row i holds numbers 2i and 2i + 1 of row n.
  void begin(int) {
    for (int64_t d = 0; d < tile_.layout.q_ld; d += kChunk) {
      typename V::F x[16];
      BFloat16 row[kChunk];
      for (int r = 0; r < 16; ++r) {
        const float* q = tile_.q + r * tile_.layout.q_ld + d;
        V::store(row, V::load(q));
        V::store(row + V::kWidth, V::load(q + V::kWidth));
        x[r] = _mm512_castsi512_ps(_mm512_loadu_si512(row));
      }
      V::transpose(x);
      for (int i = 0; i < 16; ++i) V::store(q_tiles_[d / kChunk][i], x[i]);
    }
  }

  void end(int rows) {
    for (int r = 0; r < rows; ++r) {
      float* o = tile_.o + r * tile_.layout.o_ld;
      for (int64_t d = 0; d < tile_.layout.o_ld; d += kChunk) {
        typename V::F even = V::load(o + d), odd = V::load(o + d + V::kWidth);
        V::interleave(even, odd);
        V::store(o + d, even);
        V::store(o + d + V::kWidth, odd);
      }
    }
  }

  void begin_tile(const BFloat16* const* k_rows, const BFloat16* const* v_rows, int n,
                  const BFloat16* const* next_k_rows, int next_n) {
    k_rows_ = k_rows;
    v_rows_ = v_rows;
    num_keys_ = n;
    next_k_rows_ = next_k_rows;
    next_n_ = next_n;
  }

  // s = q . k for the keys that are needed, 64 at a time, because the latency of a product is the
  // time of four. Prefetches the tile's V rows.
  void scores(int, int rows, const StripKeys* strips) {
    const StripKeys need = strips[0];
    const int first = need.begin / kKeys * kKeys;
    Prefetcher<BFloat16> prefetcher(v_rows_ + need.begin, need.end - need.begin, value_head_dim_,
                                    (need.end - first + kKeys - 1) / kKeys);
    for (int key = first; key < need.end; key += 4 * kKeys) {
      Operand k[4];
      for (int i = 0; i < 4; ++i) {
        BFloat16* copy = copies_ + i * kKeys * tile_.layout.q_ld;
        // Beyond the keys that are needed, any rows will do: nobody reads their scores.
        k[i] = key + i * kKeys < need.end
                   ? operand(k_rows_, key + i * kKeys, head_dim_, tile_.layout.q_ld, copy)
                   : k[0];
      }
      AmxTiles::fence(copies_);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < tile_.layout.q_ld; d += kChunk) {
        _tile_loadd(6, q_tiles_[d / kChunk], 64);
        _tile_loadd(4, k[0].rows + d, k[0].stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, k[1].rows + d, k[1].stride);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, k[2].rows + d, k[2].stride);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, k[3].rows + d, k[3].stride);
        _tile_dpbf16ps(3, 5, 6);
      }
      _tile_stored(0, transposed_[0], 64);
      _tile_stored(1, transposed_[1], 64);
      _tile_stored(2, transposed_[2], 64);
      _tile_stored(3, transposed_[3], 64);
      for (int i = 0; i < 4 && key + i * kKeys < need.end; ++i) {
        prefetcher.step();
        typename V::F x[16];
        GQA_UNROLL(16)
        for (int j = 0; j < 16; ++j) x[j] = V::load(transposed_[i][j]);
        V::transpose(x);
        float* s = tile_.s + key + i * kKeys;
        GQA_UNROLL(16)
        for (int r = 0; r < 16; ++r) {
          if (r < rows) V::store(s + r * tile_.layout.keys, x[r]);
        }
      }
    }
  }

  // o += p . v; prefetches the next tile's K rows
  void accumulate(int, int rows, const StripKeys* strips) {
    const int first = strips[0].begin / kKeys * kKeys, end = strips[0].end;
    const int64_t ldp = tile_.layout.keys, ldo = tile_.layout.o_ld;
    const int64_t p_bytes = ldp * 4, o_bytes = ldo * 4;
    Prefetcher<BFloat16> prefetcher(next_k_rows_, next_n_, head_dim_,
                                    static_cast<int>(ldo / kChunk));
    for (int r = 0; r < rows; ++r) {
      for (int key = first; key < end; key += V::kWidth) {
        float* place = tile_.s + r * ldp + key;
        const typename V::F p = V::round_to(V::load(place), static_cast<BFloat16*>(nullptr));
        V::store(place, p);
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(p), 16);
        V::store(low_ + r * ldp + key, _mm512_castsi512_ps(low));
      }
    }
    Operand v[kMaxTileKeys / kKeys];
    for (int key = first; key < end; key += kKeys) {
      v[key / kKeys] = operand(v_rows_, key, value_head_dim_, ldo, v_copies_ + key * ldo);
    }
    AmxTiles::fence(tile_.s);
    for (int64_t d = 0; d < ldo; d += 2 * kChunk) {
      const bool both = d + kChunk < ldo;
      float* o = tile_.o + d;
      _tile_loadd(0, o, o_bytes);
      _tile_loadd(1, o + 16, o_bytes);
      if (both) {
        _tile_loadd(2, o + 32, o_bytes);
        _tile_loadd(3, o + 48, o_bytes);
      }
      for (int key = first; key < end; key += kKeys) {
        const Operand& x = v[key / kKeys];
        _tile_loadd(4, low_ + key, p_bytes);
        _tile_loadd(6, x.rows + d, x.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, tile_.s + key, p_bytes);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
          _tile_loadd(7, x.rows + d + kChunk, x.stride);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, o, o_bytes);
      _tile_stored(1, o + 16, o_bytes);
      if (both) {
        _tile_stored(2, o + 32, o_bytes);
        _tile_stored(3, o + 48, o_bytes);
      }
      prefetcher.step();
      if (both) prefetcher.step();
    }
  }

 private:
  static constexpr int kKeys = 16;  // of a tile

  struct Operand {  // of a tile: 16 rows at one distance
    const BFloat16* rows;
    int64_t stride;  // bytes
  };

  // Rows [key, key + 16) where they lie, or their copy, padded with zeros in both directions.
  Operand operand(const BFloat16* const* rows, int key, int64_t dims, int64_t padded_dims,
                  BFloat16* copy) const {
    const int n = num_keys_ - key < kKeys ? num_keys_ - key : kKeys;
    if (n == kKeys && dims % kChunk == 0) {
      const auto address = [&](int i) { return reinterpret_cast<intptr_t>(rows[key + i]); };
      const int64_t distance = address(1) - address(0);
      bool even = true;
      for (int i = 2; i < kKeys; ++i) even &= address(i) - address(0) == i * distance;
      if (even) return {rows[key], distance};
    }
    for (int i = 0; i < kKeys; ++i) {
      for (int64_t d = 0; d < padded_dims; d += kChunk) {
        const __m512i x = load_chunk(i < n ? rows[key + i] : nullptr, d, dims);
        _mm512_storeu_si512(copy + i * padded_dims + d, x);
      }
    }
    return {copy, padded_dims * 2};
  }

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  BFloat16* copies_;    // [4 * 16, q_ld]  of K
  BFloat16* v_copies_;  // [keys, o_ld]
  float* low_;          // [16, keys]  probabilities in the lower halves of dwords
  const BFloat16* const* k_rows_ = nullptr;
  const BFloat16* const* v_rows_ = nullptr;
  const BFloat16* const* next_k_rows_ = nullptr;
  int num_keys_ = 0, next_n_ = 0;
  alignas(64) float q_tiles_[kMaxHeadDim / kChunk][16][16];
  alignas(64) float transposed_[4][16][16];  // scores of 64 keys
};

}  // namespace gqa::cpu::GQA_ISA
