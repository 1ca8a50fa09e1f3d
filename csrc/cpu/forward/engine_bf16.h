// Products of bf16 pairs on vdpbf16ps: 6 rows x 2 vectors of 16 columns, like the micro-kernel of
// products_packed.h, with two multiply-adds a lane.
//
// vdpbf16ps adds both products of a pair in fp32, rounding to nearest even after each; subnormal
// numbers count as 0, in and out. (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2, VDPBF16PS.)
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa/isa.h"
#include "pairs.h"
#include "tile.h"

namespace gqa::cpu::GQA_ISA {

template <class V>
struct DotProductEngine {
  static constexpr int kRows = kStripRows;
  static constexpr int kBlockRows = kMaxTileRows;
  static constexpr bool kFewPack = false;

  template <bool kAdd>
  static GQA_INLINE void multiply(int, const BFloat16* a, int64_t lda, const BFloat16* b,
                                  int64_t chunks, float* c, int64_t ldc) {
    using F = typename V::F;
    F sum[kRows][2];
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = kAdd ? V::load(c + r * ldc) : V::set1(0.0f);
      sum[r][1] = kAdd ? V::load(c + r * ldc + V::kWidth) : V::set1(0.0f);
    }
    for (; chunks > 0; --chunks, a += kChunk, b += kChunkNumbers) {
      for (int i = 0; i < kChunk; i += 2) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b + i * 16);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + i * 16 + kTileNumbers);
        GQA_UNROLL(6)
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          std::memcpy(&pair, a + r * lda + i, sizeof pair);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, left);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, right);
        }
      }
    }
    GQA_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      V::store(c + r * ldc, sum[r][0]);
      V::store(c + r * ldc + V::kWidth, sum[r][1]);
    }
  }
};

}  // namespace gqa::cpu::GQA_ISA
