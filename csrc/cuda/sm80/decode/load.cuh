// K and V of one warp's keys, from global to shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// The place of 16-byte chunk `chunk` of a row in shared memory. Chunks are permuted by an XOR with
// the number of the row's line of 128 bytes, so that the eight rows that ldmatrix reads at one
// chunk lie in different banks; where a line has several rows, these lie beside each other anyway.
template <int kRowBytes>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  constexpr int kChunks = kRowBytes / 16, kRowsOfLine = kChunks < 8 ? 8 / kChunks : 1;
  constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
  return row * kRowBytes + ((chunk ^ (row / kRowsOfLine & kMask)) << 4);
}

// 16 bytes from `src` on, of which `count` exist (it may be <= 0 or > 16), element by element.
template <class S>
__device__ __forceinline__ uint4 load_elements(const uint8_t* src, int count) {
  using Bits = std::conditional_t<sizeof(S) == 1, uint8_t, uint16_t>;
  constexpr int kSize = sizeof(Bits);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; i += kSize) {
    if (i < count) {
      const uint32_t bits = *reinterpret_cast<const Bits*>(src + i);
      words[i / 4] |= bits << (i % 4 * 8);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Block after block of K or V into a warp's part of the stages. Lane l looks up key l % 16 of a
// block; neighbouring lanes copy up to 128 bytes of a row at a time.
template <class S, class C, bool kKeys>
struct BlockLoader {
  CopyRows<S> rows;
  int row_bytes;  // of a row's numbers
  int limit;      // no key from here on is read

  // Keys first .. first + 15 to shared address `dst`. `page`: of key first + lane % 16.
  __device__ __forceinline__ void load(int first, uint32_t page, uint32_t dst,
                                       bool elements) const {
    constexpr int kChunks = C::kRowBytes / 16, kLanes = kChunks < 8 ? kChunks : 8;
    constexpr int kRows = 32 / kLanes;  // at once
    const int lane = threadIdx.x & 31, mine = first + (lane & 15);
    const S* at = nullptr;
    if (mine < limit) at = kKeys ? rows.key_row(mine, page) : rows.row(mine, page);
    const auto copy_row = [&](int row, auto copy) {
      const uint8_t* src = reinterpret_cast<const uint8_t*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(at), row));
      const int available = src == nullptr ? 0 : row_bytes;
#pragma unroll
      for (int c = 0; c < kChunks / kLanes; ++c) {
        const int chunk = c * kLanes + lane % kLanes;
        copy(dst + chunk_offset<C::kRowBytes>(row, chunk), src + chunk * 16,
             available - chunk * 16);
      }
    };
    if (elements) {
#pragma unroll 1
      for (int row = lane / kLanes; row < kWarpKeys; row += kRows) {
        copy_row(row, [](uint32_t to, const uint8_t* src, int count) {
          st_shared_v4(to, load_elements<S>(src, count));
        });
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWarpKeys / kRows; ++i) {
        copy_row(i * kRows + lane / kLanes, [](uint32_t to, const uint8_t* src, int count) {
          cp_async16(to, src, min(max(count, 0), 16));
        });
      }
    }
  }
};

}  // namespace gqa::cuda::sm80
