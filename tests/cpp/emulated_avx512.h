// The AVX-512, AVX512_BF16 and AMX intrinsics that csrc/cpu uses, in plain C++ on the compiler's
// vector types: what Intel's manual (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2) says each instruction computes, on any processor and under sanitizers. They lie in the
// kernels' own namespace, where they hide the compiler's.
//
// Every memory operand is read or written byte by byte where the instruction would, so that address
// sanitizers see it; masked-off elements are not touched. Tile instructions end the program where
// the processor would raise an exception: without a configuration, or with an operand of no shape
// that was configured.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "core/params.h"
#include "cpu/isa/isa.h"
#include "cpu/isa/scalars.h"

#ifndef _CMP_EQ_OQ
#define _CMP_EQ_OQ 0x00
#define _CMP_UNORD_Q 0x03
#define _CMP_LT_OQ 0x11
#endif
#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0x00
#endif

namespace gqa::cpu::GQA_ISA {

typedef float __m512 __attribute__((vector_size(64)));
typedef float __m128 __attribute__((vector_size(16)));
typedef uint32_t __m512i __attribute__((vector_size(64)));
typedef uint32_t __m256i __attribute__((vector_size(32)));
typedef uint32_t __m128i __attribute__((vector_size(16)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

namespace emulated {

// A vector's bytes as N numbers of another type.
template <class T, int N, class V>
struct Lanes {
  T x[N];
  Lanes() : x{} {}
  explicit Lanes(const V& vector) {
    static_assert(sizeof(V) == sizeof x, "lanes must fill the vector");
    std::memcpy(x, &vector, sizeof x);
  }
  V vector() const {
    V result;
    std::memcpy(&result, x, sizeof result);
    return result;
  }
};
using Uint16x32 = Lanes<uint16_t, 32, __m512i>;
using Uint16x16 = Lanes<uint16_t, 16, __m256i>;
using Bytes16 = Lanes<uint8_t, 16, __m128i>;
using Bytes32 = Lanes<uint8_t, 32, __m256i>;

template <class V>
inline V load(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Elements of `bytes` bytes whose mask bit is 1; 0 elsewhere.
template <class V>
inline V load_masked(const void* p, uint32_t mask, int bytes) {
  V x{};
  for (size_t i = 0; i * bytes < sizeof x; ++i) {
    const size_t at = i * bytes;
    if (mask >> i & 1) {
      std::memcpy(reinterpret_cast<char*>(&x) + at, static_cast<const char*>(p) + at, bytes);
    }
  }
  return x;
}

// A bf16 operand or an fp32 result of the dot products: subnormal numbers are zeros of their sign.
inline float flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
inline float bf16(uint16_t bits) { return flush(to_float(BFloat16{bits})); }
inline float multiply_add(float a, float b, float c) { return flush(std::fma(a, b, flush(c))); }

// Volume 2, VCVTNEPS2BF16, convert_fp32_to_bfloat16.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (std::fpclassify(x) == FP_SUBNORMAL) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return to_bfloat16(x).bits;
}

template <class Compare>
inline __mmask16 compare(__m512 a, __m512 b, Compare holds) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(holds(a[i], b[i])) << i;
  return static_cast<__mmask16>(mask);
}

// Lane i of the result is lane from(i) of both vectors, b's lanes counted from 16 on.
template <class From>
inline __m512 gather(__m512 a, __m512 b, From from) {
  float lanes[32];
  std::memcpy(lanes, &a, sizeof a);
  std::memcpy(lanes + 16, &b, sizeof b);
  __m512 x;
  for (int i = 0; i < 16; ++i) x[i] = lanes[from(i)];
  return x;
}

}  // namespace emulated

// ---- memory
inline __m512 _mm512_loadu_ps(const void* p) { return emulated::load<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
inline __m256i _mm256_loadu_si256(const __m256i* p) { return emulated::load<__m256i>(p); }
inline __m128i _mm_loadu_si128(const __m128i* p) { return emulated::load<__m128i>(p); }
inline __m128i _mm_loadl_epi64(const __m128i* p) { return emulated::load_masked<__m128i>(p, 1, 8); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated::load_masked<__m512>(p, mask, 4);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulated::load_masked<__m512i>(p, mask, 2);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated::load_masked<__m256i>(p, mask, 2);
}
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
inline void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(p, &x, sizeof x); }
inline void _mm_storeu_ps(float* p, __m128 x) { std::memcpy(p, &x, sizeof x); }

// ---- constants
inline __m512 _mm512_set1_ps(float x) {
  return __m512{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_set1_epi32(int32_t value) {
  const uint32_t x = static_cast<uint32_t>(value);
  return __m512i{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
template <class... T>
inline __m512 _mm512_setr_ps(T... x) {
  return __m512{static_cast<float>(x)...};
}
template <class... T>
inline __m512i _mm512_setr_epi32(T... x) {
  return __m512i{static_cast<uint32_t>(x)...};
}
inline __m256i _mm256_set1_epi16(int16_t x) {
  emulated::Uint16x16 lanes;
  for (uint16_t& lane : lanes.x) lane = static_cast<uint16_t>(x);
  return lanes.vector();
}
inline __m128i _mm_set1_epi8(int8_t x) {
  emulated::Bytes16 lanes;
  for (uint8_t& lane : lanes.x) lane = static_cast<uint8_t>(x);
  return lanes.vector();
}
inline __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
inline __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
inline __m128 _mm512_castps512_ps128(__m512 x) { return __m128{x[0], x[1], x[2], x[3]}; }

// ---- fp32 arithmetic
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m128 _mm_add_ps(__m128 a, __m128 b) { return a + b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  __m512 sum;
  for (int i = 0; i < 16; ++i) sum[i] = std::fma(a[i], b[i], c[i]);
  return sum;
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {  // b where either is NaN
  return (__m512)(((__m512i)(a > b) & (__m512i)a) | (~(__m512i)(a > b) & (__m512i)b));
}
inline __m512 _mm512_and_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a & (__m512i)b); }
inline __m512 _mm512_or_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a | (__m512i)b); }
inline __m512 _mm512_andnot_ps(__m512 a, __m512 b) { return (__m512)(~(__m512i)a & (__m512i)b); }
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  switch (predicate) {
    case _CMP_EQ_OQ: return emulated::compare(a, b, [](float x, float y) { return x == y; });
    case _CMP_LT_OQ: return emulated::compare(a, b, [](float x, float y) { return x < y; });
    default: return emulated::compare(a, b, [](float x, float y) { return x != x || y != y; });
  }
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = mask >> i & 1 ? b[i] : a[i];
  return a;
}
// Their order of additions is the compilers': halves, quarters and so on.
inline float _mm512_reduce_add_ps(__m512 x) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}
inline float _mm512_reduce_max_ps(__m512 x) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}

// ---- integers
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return a + b; }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return a - b; }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned n) { return x << n; }
inline __m512i _mm512_srli_epi32(__m512i x, unsigned n) { return x >> n; }
inline __m256i _mm256_and_si256(__m256i a, __m256i b) { return a & b; }
inline __m128i _mm_and_si128(__m128i a, __m128i b) { return a & b; }
inline __m256i _mm256_slli_epi16(__m256i x, int n) {
  emulated::Uint16x16 lanes(x);
  for (uint16_t& lane : lanes.x) lane = static_cast<uint16_t>(lane << n);
  return lanes.vector();
}
inline __m128i _mm_srli_epi16(__m128i x, int n) {
  emulated::Lanes<uint16_t, 8, __m128i> lanes(x);
  for (uint16_t& lane : lanes.x) lane = static_cast<uint16_t>(lane >> n);
  return lanes.vector();
}
inline __mmask16 _mm256_cmpeq_epi16_mask(__m256i a, __m256i b) {
  const emulated::Uint16x16 x(a), y(b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(x.x[i] == y.x[i]) << i;
  return static_cast<__mmask16>(mask);
}
inline __m256i _mm256_mask_blend_epi16(__mmask16 mask, __m256i a, __m256i b) {
  emulated::Uint16x16 x(a);
  const emulated::Uint16x16 y(b);
  for (int i = 0; i < 16; ++i) x.x[i] = mask >> i & 1 ? y.x[i] : x.x[i];
  return x.vector();
}

// ---- conversions
inline __m512 _mm512_cvtph_ps(__m256i x) {
  const emulated::Uint16x16 halves(x);
  __m512 wide;
  for (int i = 0; i < 16; ++i) wide[i] = to_float(Float16{halves.x[i]});
  return wide;
}
inline __m256i _mm512_cvtps_ph(__m512 x, int) {  // to nearest even
  emulated::Uint16x16 halves;
  for (int i = 0; i < 16; ++i) halves.x[i] = to_float16(x[i]).bits;
  return halves.vector();
}
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
  __m256bh narrow;
  for (int i = 0; i < 16; ++i) narrow[i] = emulated::to_bf16(x[i]);
  return narrow;
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
  __m512 wide;
  for (int i = 0; i < 16; ++i) wide[i] = static_cast<float>(static_cast<int32_t>(x[i]));
  return wide;
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
  emulated::Uint16x16 low;
  for (int i = 0; i < 16; ++i) low.x[i] = static_cast<uint16_t>(x[i]);
  return low.vector();
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  const emulated::Uint16x16 words(x);
  __m512i wide;
  for (int i = 0; i < 16; ++i) wide[i] = words.x[i];
  return wide;
}
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  const emulated::Bytes16 bytes(x);
  __m512i wide;
  for (int i = 0; i < 16; ++i) wide[i] = bytes.x[i];
  return wide;
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  const emulated::Bytes16 bytes(x);
  __m512i wide;
  for (int i = 0; i < 16; ++i) {
    wide[i] = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(bytes.x[i])));
  }
  return wide;
}
inline __m256i _mm256_cvtepu8_epi16(__m128i x) {
  const emulated::Bytes16 bytes(x);
  emulated::Uint16x16 wide;
  for (int i = 0; i < 16; ++i) wide.x[i] = bytes.x[i];
  return wide.vector();
}
inline __m256i _mm256_cvtepi8_epi16(__m128i x) {
  const emulated::Bytes16 bytes(x);
  emulated::Uint16x16 wide;
  for (int i = 0; i < 16; ++i) {
    wide.x[i] = static_cast<uint16_t>(static_cast<int16_t>(static_cast<int8_t>(bytes.x[i])));
  }
  return wide.vector();
}

// ---- lanes: "quarters" are 128 bits
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return emulated::gather(a, b, [](int i) { return i % 2 * 16 + i / 4 * 4 + i % 4 / 2; });
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return emulated::gather(a, b, [](int i) { return i % 2 * 16 + i / 4 * 4 + 2 + i % 4 / 2; });
}
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int control) {  // within quarters
  return emulated::gather(
      a, b, [=](int i) { return (i % 4 < 2 ? 0 : 16) + i / 4 * 4 + (control >> i % 4 * 2 & 3); });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) {  // of quarters
  return emulated::gather(
      a, b, [=](int i) { return (i < 8 ? 0 : 16) + (control >> i / 4 * 2 & 3) * 4 + i % 4; });
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return emulated::gather(a, b, [=](int i) { return static_cast<int>(index[i] & 31); });
}
inline __m128 _mm512_extractf32x4_ps(__m512 x, int quarter) {
  const int i = quarter * 4;
  return __m128{x[i], x[i + 1], x[i + 2], x[i + 3]};
}
inline __m512i unpack_int16(__m512i a, __m512i b, int first) {
  const emulated::Uint16x32 x(a), y(b);
  emulated::Uint16x32 z;
  for (int i = 0; i < 32; ++i) z.x[i] = (i & 1 ? y : x).x[i / 8 * 8 + first + i % 8 / 2];
  return z.vector();
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpack_int16(a, b, 0); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpack_int16(a, b, 4); }

// ---- AVX512_BF16. Volume 2, VDPBF16PS: the odd products first, each a fused multiply-add.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    for (const int odd : {1, 0}) {
      const float x = emulated::bf16(a[2 * i + odd]), y = emulated::bf16(b[2 * i + odd]);
      sum[i] = emulated::multiply_add(x, y, sum[i]);
    }
  }
  return sum;
}

// ---- AMX: the tiles of a thread, with palette 1.
namespace emulated {

struct Tiles {
  unsigned char data[8][16][64];
  int rows[8], row_bytes[8];
  bool configured;
};
inline thread_local Tiles tiles{};

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", rule);
  std::abort();
}

inline void load_config(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  require(bytes[0] == 1, "the palette must be 1");
  tiles = Tiles{};
  for (int i = 0; i < 8; ++i) {
    tiles.row_bytes[i] = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tiles.rows[i] = bytes[48 + i];
    require(tiles.row_bytes[i] <= 64 && tiles.rows[i] <= 16, "a tile has 16 rows of 64 bytes");
  }
  tiles.configured = true;
}

inline void require_tile(int tile) {
  require(tiles.configured && tiles.rows[tile] > 0, "the tile must be configured");
}

inline void load_tile(int tile, const void* base, int64_t stride) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(base) + r * stride,
                tiles.row_bytes[tile]);
  }
}

inline void store_tile(int tile, void* base, int64_t stride) {
  require_tile(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
  }
}

inline void zero_tile(int tile) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

// Volume 2, TDPBF16PS: sums of even and of odd products from 0, then added to each other and to c.
inline void multiply_tiles(int c, int a, int b) {
  for (const int tile : {a, b, c}) require_tile(tile);
  const int depth = tiles.row_bytes[a] / 4, columns = tiles.row_bytes[c] / 4;
  require(c != a && c != b && a != b, "the three tiles must differ");
  require(tiles.rows[c] == tiles.rows[a] && tiles.row_bytes[c] == tiles.row_bytes[b] &&
              tiles.rows[b] == depth,
          "the tiles' shapes must agree");
  uint16_t x[32], y[16][32];
  std::memcpy(y, tiles.data[b], sizeof y);
  for (int m = 0; m < tiles.rows[c]; ++m) {
    float sums[16][2] = {}, row[16];
    std::memcpy(x, tiles.data[a][m], sizeof x);
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < columns; ++n) {
        for (int odd = 0; odd < 2; ++odd) {
          sums[n][odd] = multiply_add(bf16(x[2 * k + odd]), bf16(y[k][2 * n + odd]), sums[n][odd]);
        }
      }
    }
    std::memcpy(row, tiles.data[c][m], sizeof row);
    for (int n = 0; n < columns; ++n) {
      row[n] = flush(flush(row[n]) + flush(sums[n][0] + sums[n][1]));
    }
    std::memcpy(tiles.data[c][m], row, sizeof row);
  }
}

}  // namespace emulated

#define _tile_loadconfig emulated::load_config
#define _tile_release() (emulated::tiles = emulated::Tiles{})
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_zero emulated::zero_tile
#define _tile_dpbf16ps emulated::multiply_tiles

}  // namespace gqa::cpu::GQA_ISA
