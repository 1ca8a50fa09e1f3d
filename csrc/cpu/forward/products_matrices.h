// Both products of tasks with many rows in bf16 on NEON's BFMMLA, which multiplies 2 x 4 by 4 x 2
// numbers and adds to 2 x 2 sums in fp32. Queries and probabilities are rows of bf16. K and V are
// packed without widening: an operand holds 4 numbers along the sum for each of two columns.
//
//   c[8, 8] (+)= a[8, 8 * chunks] . b[8 * chunks, 8]
#pragma once

#include <cstdint>

#include "../isa/isa.h"
#include "../isa/math.h"
#include "kv_rows.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V>
class MatrixProducts {
 public:
  using Probability = BFloat16;  // in the first half of its row of scores
  static constexpr float score_step(int) { return 1.0f; }
  static constexpr bool kRoundsProbabilities = false;
  static constexpr int kStrip = 8;
  static constexpr RowBlocks kBlocks{kStrip, kMaxTileRows};
  static constexpr int kMaxRows = kMaxTileRows;

  MatrixProducts(const AttentionParams& params, Tile<V>& tile)
      : tile_(tile),
        head_dim_(params.head_dim),
        value_head_dim_(params.value_head_dim),
        q_(reinterpret_cast<BFloat16*>(tile.q)),
        k_panels_(reinterpret_cast<BFloat16*>(tile.k_panels)),
        v_panels_(reinterpret_cast<BFloat16*>(tile.v_panels)) {}

  // Converts queries back to bf16, contiguously at the start of their memory.
  void begin(int rows) {
    const int64_t numbers = round_up(rows, kStrip) * tile_.layout.q_ld;
    for (int64_t i = 0; i < numbers; i += V::kWidth) V::store(q_ + i, V::load(tile_.q + i));
  }
  void end(int) {}

  void begin_tile(const BFloat16* const* k_rows, const BFloat16* const* v_rows, int n,
                  const BFloat16* const*, int) {
    num_keys_ = n;
    const BFloat16* const nothing = reinterpret_cast<const BFloat16*>(kZeroRow.bytes);
    for (int key = 0; key < n; key += 2) {
      pack_keys(k_rows[key], key + 1 < n ? k_rows[key + 1] : nothing,
                k_panels_ + key / kSide * k_panel() + key % kSide * 4);
    }
    for (int key = 0; key < n; key += 4) {
      const BFloat16* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = key + i < n ? v_rows[key + i] : nothing;
      pack_values(rows, v_panels_ + key * kSide);
    }
    if (n % 8 != 0 && n % 8 <= 4) {  // the second half of the last 8 keys
      const BFloat16* const rows[4] = {nothing, nothing, nothing, nothing};
      pack_values(rows, v_panels_ + (n + 3) / 4 * 4 * kSide);
    }
  }

  // s = q . k of rows [begin, end) for the keys each strip needs
  void scores(int begin, int end, const StripKeys* strips) {
    const int64_t lds = tile_.layout.keys, ldq = tile_.layout.q_ld;
    for (int key = 0; key < num_keys_; key += kSide) {
      for (int r = begin; r < end; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (key + kSide <= need.begin || key >= need.end) continue;
        multiply<false>(q_ + r * ldq, ldq, k_panels_ + key / kSide * k_panel(), ldq / 8,
                        tile_.s + (r - begin) * lds + key, lds);
      }
    }
  }

  // o += p . v
  void accumulate(int begin, int end, const StripKeys* strips) {
    const int64_t ldp = 2 * tile_.layout.keys, ldo = tile_.layout.o_ld;
    const BFloat16* p = reinterpret_cast<const BFloat16*>(tile_.s);
    for (int64_t d = 0; d < ldo; d += kSide) {
      for (int r = begin; r < end; r += kStrip) {
        const StripKeys& need = strips[r / kStrip];
        if (need.begin >= need.end) continue;
        const int first = need.begin / 8, last = (need.end + 7) / 8;
        multiply<true>(p + (r - begin) * ldp + first * 8, ldp,
                       v_panels_ + d / kSide * v_panel() + first * 8 * kSide, last - first,
                       tile_.o + r * ldo + d, ldo);
      }
    }
  }

 private:
  static constexpr int kSide = 8;  // rows and columns of the micro-kernel

  int64_t k_panel() const { return tile_.layout.q_ld * kSide; }
  int64_t v_panel() const { return tile_.layout.keys * kSide; }

  // `n` numbers of a row from d on, at most 8, then zeros.
  static GQA_INLINE uint16x8_t load8(const BFloat16* row, int64_t d, int64_t n) {
    if (n >= 8) return vld1q_u16(&row[d].bits);
    uint16_t numbers[8] = {};
    if (n > 0) std::memcpy(numbers, row + d, n * sizeof(BFloat16));
    return vld1q_u16(numbers);
  }

  // Panel of 8 keys: [D / 4][key / 2][2 keys x 4 numbers].
  void pack_keys(const BFloat16* a, const BFloat16* b, BFloat16* panel) const {
    for (int64_t d = 0; d < tile_.layout.q_ld; d += 8) {
      const uint64x2_t x = vreinterpretq_u64_u16(load8(a, d, head_dim_ - d));
      const uint64x2_t y = vreinterpretq_u64_u16(load8(b, d, head_dim_ - d));
      vst1q_u16(&panel[d * kSide].bits, vreinterpretq_u16_u64(vzip1q_u64(x, y)));
      vst1q_u16(&panel[(d + 4) * kSide].bits, vreinterpretq_u16_u64(vzip2q_u64(x, y)));
    }
  }

  // Panels of 8 columns: [keys / 4][column / 2][2 columns x 4 keys].
  void pack_values(const BFloat16* const (&rows)[4], BFloat16* panels) const {
    for (int64_t d = 0; d < tile_.layout.o_ld; d += 8, panels += v_panel()) {
      uint16x8_t x[4];
      GQA_UNROLL(4)
      for (int i = 0; i < 4; ++i) x[i] = load8(rows[i], d, value_head_dim_ - d);
      GQA_UNROLL(2)
      for (int half = 0; half < 2; ++half) {
        const uint32x4_t low =
            vreinterpretq_u32_u16(half ? vzip2q_u16(x[0], x[1]) : vzip1q_u16(x[0], x[1]));
        const uint32x4_t high =
            vreinterpretq_u32_u16(half ? vzip2q_u16(x[2], x[3]) : vzip1q_u16(x[2], x[3]));
        vst1q_u16(&panels[half * 16].bits, vreinterpretq_u16_u32(vzip1q_u32(low, high)));
        vst1q_u16(&panels[half * 16 + 8].bits, vreinterpretq_u16_u32(vzip2q_u32(low, high)));
      }
    }
  }

  template <bool kAdd>
  static GQA_NOINLINE void multiply(const BFloat16* a, int64_t lda, const BFloat16* b,
                                    int64_t chunks, float* c, int64_t ldc) {
    float32x4_t sum[4][4];  // of rows 2i, 2i + 1 and columns 2j, 2j + 1
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      float* const row = c + 2 * i * ldc;
      GQA_UNROLL(4)
      for (int j = 0; j < 4; ++j) {
        sum[i][j] = kAdd ? vcombine_f32(vld1_f32(row + 2 * j), vld1_f32(row + ldc + 2 * j))
                         : vdupq_n_f32(0.0f);
      }
    }
    for (; chunks > 0; --chunks, a += 8, b += 8 * kSide) {
      bfloat16x8_t x[2][4];
      GQA_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        const uint64x2_t low = vreinterpretq_u64_u16(vld1q_u16(&a[2 * i * lda].bits));
        const uint64x2_t high = vreinterpretq_u64_u16(vld1q_u16(&a[(2 * i + 1) * lda].bits));
        x[0][i] = vreinterpretq_bf16_u64(vzip1q_u64(low, high));
        x[1][i] = vreinterpretq_bf16_u64(vzip2q_u64(low, high));
      }
      GQA_UNROLL(2)
      for (int half = 0; half < 2; ++half) {
        GQA_UNROLL(4)
        for (int j = 0; j < 4; ++j) {
          const bfloat16x8_t y =
              vreinterpretq_bf16_u16(vld1q_u16(&b[half * 4 * kSide + j * 8].bits));
          GQA_UNROLL(4)
          for (int i = 0; i < 4; ++i) sum[i][j] = vbfmmlaq_f32(sum[i][j], x[half][i], y);
        }
      }
    }
    GQA_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      float* const row = c + 2 * i * ldc;
      GQA_UNROLL(4)
      for (int j = 0; j < 4; ++j) {
        vst1_f32(row + 2 * j, vget_low_f32(sum[i][j]));
        vst1_f32(row + ldc + 2 * j, vget_high_f32(sum[i][j]));
      }
    }
  }

  Tile<V>& tile_;
  int64_t head_dim_, value_head_dim_;
  BFloat16* q_;         // [rows, q_ld]
  BFloat16* k_panels_;  // [keys / 8, q_ld / 4, 4, 2 x 4]
  BFloat16* v_panels_;  // [o_ld / 8, keys / 4, 4, 2 x 4]
  int num_keys_ = 0;
};

}  // namespace gqa::cpu::GQA_ISA
