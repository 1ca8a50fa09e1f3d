// Products of bf16 pairs on AMX tiles of 16 rows x 64 bytes: 2 x 2 tiles of sums, so that each
// loaded tile serves two products. One product is 16 x 16 x 32 multiply-adds in 16 cycles; it waits
// for loads from beyond the first-level cache and for stores of tiles. Therefore scores, softmax
// and second product process a block of 32 rows at a time: its scores, probabilities and output
// stay in 48 KiB, and only K and V are streamed.
//
// tdpbf16ps sums the even and the odd numbers of a row separately, each in fp32 with rounding to
// nearest even, then adds both to the accumulator. It takes subnormal numbers for 0, in operands
// and results. (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.)
#pragma once

#include <cstdint>

#include "../isa/isa.h"
#include "pairs.h"

namespace gqa::cpu::GQA_ISA {

// Configures the calling thread's tiles, all of 16 rows x 64 bytes, and releases them at its end.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    fence(&config);
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  // Makes the compiler write pending stores. Its tile loads don't declare that they read memory.
  static GQA_INLINE void fence(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

 private:
  struct Config {  // the operand of ldtilecfg
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <class V>
struct AmxEngine {
  static constexpr int kRows = 32;
  static constexpr int kBlockRows = 32;
  static constexpr bool kFewPack = true;  // products_amx.h copies into that memory

  template <bool kAdd>
  static GQA_INLINE void multiply(int rows, const BFloat16* a, int64_t lda, const BFloat16* b,
                                  int64_t chunks, float* c, int64_t ldc) {
    AmxTiles::fence(a);
    rows > 16 ? multiply32<kAdd>(a, lda, b, chunks, c, ldc)
              : multiply16<kAdd>(a, lda, b, chunks, c, ldc);
  }

 private:
  template <bool kAdd>
  static GQA_INLINE void multiply32(const BFloat16* a, int64_t lda, const BFloat16* b,
                                    int64_t chunks, float* c, int64_t ldc) {
    const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
    if (kAdd) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, c + 16 * ldc, c_bytes);
      _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (; chunks > 0; --chunks, a += kChunk, b += kChunkNumbers) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileNumbers, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * ldc, c_bytes);
    _tile_stored(3, c + 16 * ldc + 16, c_bytes);
  }

  template <bool kAdd>
  static GQA_INLINE void multiply16(const BFloat16* a, int64_t lda, const BFloat16* b,
                                    int64_t chunks, float* c, int64_t ldc) {
    const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
    if (kAdd) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (; chunks > 0; --chunks, a += kChunk, b += kChunkNumbers) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kTileNumbers, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
  }
};

}  // namespace gqa::cpu::GQA_ISA
