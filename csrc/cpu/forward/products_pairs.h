// Both products of tasks with many rows in bf16 (pairs.h): K and V are packed once without
// widening, and queries and probabilities are rows of bf16. Engine multiplies them:
//
//   Engine::kRows: rows of one call; Engine::kBlockRows, kFewPack: as in RowBlocks
//   Engine::multiply<add>(rows, a, lda, b, chunks, c, ldc), as in pairs.h
#pragma once

#include <cstdint>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "pairs.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V, class Engine>
class PairProducts {
 public:
  using Probability = BFloat16;  // in the first half of its row of scores
  static constexpr float score_step(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr RowBlocks kBlocks{Engine::kRows, Engine::kBlockRows, Engine::kFewPack};
  static constexpr int kMaxRows = kMaxTileRows;
  static constexpr int kStrip = Engine::kRows;

  PairProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile),
        head_dim_(params.head_dim),
        value_head_dim_(params.value_head_dim),
        d_chunks_(tile.layout.q_ld / kChunk),
        key_chunks_(tile.layout.keys / kChunk),
        q_(reinterpret_cast<BFloat16*>(tile.q)),
        k_chunks_(reinterpret_cast<BFloat16*>(tile.k_panels)),
        v_chunks_(reinterpret_cast<BFloat16*>(tile.v_panels)) {}

  // Converts queries back to bf16, contiguously at the start of their memory.
  void begin(int rows) {
    const int64_t numbers = round_up(rows, Engine::kRows) * tile_.layout.q_ld;
    for (int64_t i = 0; i < numbers; i += V::kWidth) V::store(q_ + i, V::load(tile_.q + i));
  }

  void end(int rows) {
    for (int r = 0; r < rows; ++r) {
      float* o = tile_.o + r * tile_.layout.o_ld;
      for (int64_t d = 0; d < tile_.layout.o_ld; d += kChunk) V::order_columns(o + d);
    }
  }

  void begin_tile(const BFloat16* const* k_rows, const BFloat16* const* v_rows, int n,
                  const BFloat16* const*, int) {
    pack_columns<V>(k_rows, n, head_dim_, k_chunks_);
    pack_interleaved(v_rows, n, value_head_dim_, tile_.layout.keys, v_chunks_);
    num_keys_ = n;
  }

  // s = q . k of rows [begin, end) for the keys each strip needs
  void scores(int begin, int end, const StripKeys* strips) {
    const int64_t lds = tile_.layout.keys, ldq = tile_.layout.q_ld;
    for (int key = 0; key < num_keys_; key += kChunk) {
      const BFloat16* chunks = k_chunks_ + key / kChunk * d_chunks_ * kChunkNumbers;
      for (int r = begin; r < end; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (key + kChunk <= need.begin || key >= need.end) continue;
        Engine::template multiply<false>(end - r, q_ + r * ldq, ldq, chunks, d_chunks_,
                                         tile_.s + (r - begin) * lds + key, lds);
      }
    }
  }

  // o += p . v
  void accumulate(int begin, int end, const StripKeys* strips) {
    const int64_t ldp = 2 * tile_.layout.keys, ldo = tile_.layout.o_ld;
    BFloat16* p = reinterpret_cast<BFloat16*>(tile_.s);
    for (int r = begin; r < end; ++r) zero_around(p + (r - begin) * ldp, strips[r / kStrip]);
    for (int64_t d = 0; d < ldo; d += kChunk) {
      const BFloat16* chunks = v_chunks_ + d / kChunk * key_chunks_ * kChunkNumbers;
      for (int r = begin; r < end; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (need.begin >= need.end) continue;
        const int64_t first = need.begin / kChunk, last = (need.end + kChunk - 1) / kChunk;
        Engine::template multiply<true>(end - r, p + (r - begin) * ldp + first * kChunk, ldp,
                                        chunks + first * kChunkNumbers, last - first,
                                        tile_.o + r * ldo + d, ldo);
      }
    }
  }

 private:
  // The softmax writes whole vectors, the products read whole chunks.
  static void zero_around(BFloat16* p, const StripKeys& need) {
    if (need.begin >= need.end) return;
    const int first = need.begin / V::kWidth * V::kWidth;
    const int last = static_cast<int>(round_up(need.end, V::kWidth));
    if (first % kChunk != 0) V::store(p + first - V::kWidth, V::set1(0.0f));
    if (last % kChunk != 0) V::store(p + last, V::set1(0.0f));
  }

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  int64_t d_chunks_, key_chunks_;
  BFloat16* q_;         // [rows, q_ld]
  BFloat16* k_chunks_;  // [keys / 32, q_ld / 32, chunk]
  BFloat16* v_chunks_;  // [o_ld / 32, keys / 32, chunk]
  int num_keys_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
