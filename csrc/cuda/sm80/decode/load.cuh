// K and V of one warp's keys, from global to shared memory.
#pragma once

#include <cstdint>

#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// The place of 16-byte chunk `chunk` of a row in shared memory: chunks are permuted by chunk ^ (row
// % 8), so that the eight rows that ldmatrix reads at one chunk lie in different banks.
template <int kD>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * DecodeConfig<kD>::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Eight elements of a row from `src` on, of which `count` exist (it may be <= 0 or > 8).
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* src, int count) {
  uint32_t pairs[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) pairs[i / 2] |= static_cast<uint32_t>(src[i].bits) << (i % 2 * 16);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Block after block of K or V into a warp's part of the stages. Lane l looks up key l % 16 of a
// block, and copies 16 bytes of key l / 8 + 4 i: eight lanes read 128 bytes of a row at a time.
template <class T, int kD, bool kKeys, bool kElements>
struct BlockLoader {
  CopyRows<T> rows;
  int dim;    // of a row
  int limit;  // no key from here on is read

  // Keys first .. first + 15 to shared address `dst`. `page`: of key first + lane % 16.
  __device__ __forceinline__ void load(int first, uint32_t page, uint32_t dst) const {
    const int lane = threadIdx.x & 31, mine = first + (lane & 15);
    const T* at = nullptr;
    if (mine < limit) at = kKeys ? rows.key_row(mine, page) : rows.row(mine, page);
#pragma unroll
    for (int i = 0; i < kWarpKeys / 4; ++i) {
      const int row = i * 4 + (lane >> 3);
      const T* src = reinterpret_cast<const T*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(at), row));
      const int available = src == nullptr ? 0 : dim;
#pragma unroll
      for (int c = 0; c < kD / 64; ++c) {
        const int chunk = c * 8 + (lane & 7);
        const uint32_t to = dst + chunk_offset<kD>(row, chunk);
        if constexpr (kElements) {
          st_shared_v4(to, load_elements(src + chunk * 8, available - chunk * 8));
        } else {
          cp_async16(to, src + chunk * 8, min(max((available - chunk * 8) * 2, 0), 16));
        }
      }
    }
  }
};

}  // namespace gqa::cuda::sm80
