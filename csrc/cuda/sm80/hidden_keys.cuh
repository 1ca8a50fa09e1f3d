// Scores of a warp whose rows are query tokens and whose columns are keys: which is which, and the
// keys that a row does not see.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "../common/softmax.cuh"
#include "products.cuh"

namespace gqa::cuda::sm80 {

// The token, among the sequence's, of a lane's row (m, h); `warp_token` is the warp's first.
__device__ __forceinline__ int lane_token(int warp_token, int m, int h) {
  return warp_token + m * 16 + h * 8 + static_cast<int>(threadIdx.x % 32 / 4);
}

// The key, relative to the block's first, of a lane's element (n, e).
__device__ __forceinline__ int lane_key(int n, int e) {
  return n * 8 + static_cast<int>(threadIdx.x % 4 * 2) + e;
}

// -inf for keys that a row does not see; a row's place among the keys is its token + length - q_len.
template <class C>
__device__ __forceinline__ void hide_keys(Scores<C>& scores, const AttentionParams& params,
                                          int length, int q_len, int warp_token, int first_key) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int position = lane_token(warp_token, m, h) + length - q_len;
      const KeyRange keys = keys_around(params, length, position);
      const int begin = static_cast<int>(keys.begin) - first_key - lane_key(0, 0);
      const int end = static_cast<int>(keys.end) - first_key - lane_key(0, 0);
#pragma unroll
      for (int n = 0; n < C::kBlockN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = n * 8 + e;
          if (key < begin || key >= end) scores[m][n][h * 2 + e] = minus_infinity();
        }
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
