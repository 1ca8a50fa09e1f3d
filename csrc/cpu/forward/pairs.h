// bf16 numbers in pairs, as vdpbf16ps and the tile product read them: a dword holds two numbers
// that are neighbours along the sum, and one instruction adds both products.
//
//   c[rows, 32] (+)= a[rows, 32 * chunks] . b[32 * chunks, 32]
//
// `a` is row-major. `b` is packed in chunks of 32 numbers along the sum and 32 columns. A chunk is
// two tiles (left and right) of 16 x 16 dwords: row i of a tile holds numbers 2i and 2i + 1 of its
// 16 columns.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../isa/intrinsics_avx512.h"
#include "../isa/isa.h"

namespace gqa::cpu::GQA_ISA {

constexpr int kChunk = 32;                           // numbers that are summed over, and columns
constexpr int64_t kTileNumbers = 16 * kChunk;        // bf16 numbers of a tile
constexpr int64_t kChunkNumbers = 2 * kTileNumbers;  // of both tiles of a chunk

// Numbers [d, dims) of a row, at most 32, then zeros; zeros where there is no row.
GQA_INLINE __m512i load_chunk(const BFloat16* row, int64_t d, int64_t dims) {
  if (row == nullptr) return _mm512_setzero_si512();
  if (d + kChunk <= dims) return _mm512_loadu_si512(row + d);
  return _mm512_maskz_loadu_epi16((1u << (dims - d)) - 1, row + d);
}

// K for q . k: columns are keys, sums run over d. chunks[key / 32][d / 32]; rows from n to the
// chunk's end and numbers from dims to its end are zeros.
template <class V>
inline void pack_columns(const BFloat16* const* rows, int n, int64_t dims, BFloat16* chunks) {
  for (int key = 0; key < n; key += kChunk) {
    for (int64_t d = 0; d < dims; d += kChunk, chunks += kChunkNumbers) {
      for (int side = 0; side < 2; ++side) {
        typename V::F x[16];  // dwords: pairs of numbers
        GQA_UNROLL(16)
        for (int i = 0; i < 16; ++i) {
          const int row = key + side * 16 + i;
          x[i] = _mm512_castsi512_ps(load_chunk(row < n ? rows[row] : nullptr, d, dims));
        }
        V::transpose(x);
        float* tile = reinterpret_cast<float*>(chunks + side * kTileNumbers);
        GQA_UNROLL(16)
        for (int i = 0; i < 16; ++i) V::store(tile + i * 16, x[i]);
      }
    }
  }
}

// V for p . v: columns are d, sums run over keys. chunks[d / 32][key / 32], with room for max_keys;
// padded with zeros likewise. Unpacking works within quarters of a vector: the left tile has
// columns 0-3, 8-11, 16-19, 24-27 of the 32, the right tile the others. V::order_columns restores their order.
inline void pack_interleaved(const BFloat16* const* rows, int n, int64_t dims, int64_t max_keys,
                             BFloat16* chunks) {
  for (int64_t d = 0; d < dims; d += kChunk, chunks += max_keys / kChunk * kChunkNumbers) {
    BFloat16* to = chunks;
    for (int key = 0; key < n; key += kChunk, to += kChunkNumbers) {
      for (int i = 0; i < 16; ++i) {
        const int row = key + 2 * i;
        const __m512i even = load_chunk(row < n ? rows[row] : nullptr, d, dims);
        const __m512i odd = load_chunk(row + 1 < n ? rows[row + 1] : nullptr, d, dims);
        _mm512_storeu_si512(to + i * kChunk, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(to + kTileNumbers + i * kChunk, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }
}

}  // namespace gqa::cpu::GQA_ISA
