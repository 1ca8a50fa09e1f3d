// What happens to a block of products Q K^T in the registers of a consumer before and in the
// softmax. Layout of s: wgmma.cuh; a thread has two rows h = 0, 1 and in each the column pairs
// 8 j + 2 (lane % 4) + {0, 1}.
#pragma once

#include "../../common/mask.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "config.h"

namespace gqa::cuda::sm90 {

// The rows of one thread.
struct Rows {
  int batch, head, token;  // of row h = 0; row h = 1 is 8 tokens further
  int q_len, token0;       // tokens of the sequence; where its first one is in q, out and LSE
  int position;            // its place among the keys
  int length;              // keys of the sequence
  float slope;             // of ALiBi, in base-2 units
};

// Keys of block [key0, key0 + kBlockN) that a row does not see get -inf. `ends`, `begins`: whether
// some row of the consumer does not see the block's end, its beginning.
template <int kBlockN>
__device__ __forceinline__ void hide_keys(float (&s)[kBlockN / 2], const AttentionParams& params,
                                          const Rows& rows, int key0, bool ends, bool begins) {
  const int column = key0 + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const KeyRange seen = keys_around(params, rows.length, rows.position + 8 * h);
    if (ends) {
      const int end = static_cast<int>(seen.end) - column;
#pragma unroll
      for (int j = 0; j < kBlockN / 8; j++) {
        if (8 * j >= end) s[4 * j + 2 * h] = minus_infinity();
        if (8 * j + 1 >= end) s[4 * j + 2 * h + 1] = minus_infinity();
      }
    }
    if (begins) {
      const int begin = static_cast<int>(seen.begin) - column;
#pragma unroll
      for (int j = 0; j < kBlockN / 8; j++) {
        if (8 * j < begin) s[4 * j + 2 * h] = minus_infinity();
        if (8 * j + 1 < begin) s[4 * j + 2 * h + 1] = minus_infinity();
      }
    }
  }
}

// Products -> scores in base-2 units: scale, softcap, ALiBi, mask. Keys beyond the length are left
// to hide_keys.
template <class T, int kBlockN>
__device__ __forceinline__ void modify_scores(float (&s)[kBlockN / 2],
                                              const AttentionParams& params, const Rows& rows,
                                              int key0) {
  if (params.softcap == 0.0f) {
    const float factor = params.scale * kLog2e;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) s[i] *= factor;
  } else {
    const float inner = params.scale / params.softcap, outer = params.softcap * kLog2e;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) s[i] = outer * tanh_fast(inner * s[i]);
  }
  const int column = key0 + 2 * (threadIdx.x % 4);
  if (params.alibi_slopes != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float distance = static_cast<float>(rows.position + 8 * h - column);
#pragma unroll
      for (int j = 0; j < kBlockN / 8; j++) {
        s[4 * j + 2 * h] -= rows.slope * fabsf(distance - (8 * j));
        s[4 * j + 2 * h + 1] -= rows.slope * fabsf(distance - (8 * j + 1));
      }
    }
  }
  if (params.attn_mask == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = rows.token + 8 * h;
    if (token >= rows.q_len) continue;
    const int64_t row = rows.batch * params.mask_stride_b + rows.head * params.mask_stride_h +
                        token * params.mask_stride_q + column * params.mask_stride_k;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; j++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (column + 8 * j + e >= rows.length) continue;
        const float added = mask_score<T>(params, row + (8 * j + e) * params.mask_stride_k);
        float& score = s[4 * j + 2 * h + e];
        // Not by adding: the score of a hidden key may be NaN.
        score = added == minus_infinity() ? added : score + added;
      }
    }
  }
}

// Running maximum and sum of the two rows of a thread; the sum is of the thread's own columns.
struct OnlineSoftmax {
  float maximum[2] = {minus_infinity(), minus_infinity()};
  float sum[2] = {0.0f, 0.0f};

  // Scores -> 2^(factor * (score - maximum)), in place; factor > 0. What was summed before must be
  // multiplied by `rescale`.
  template <int kCount>
  __device__ __forceinline__ void update(float (&s)[kCount], float factor, float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = maximum[h];
#pragma unroll
      for (int j = 0; j < kCount / 4; j++)
        top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      top = quad_max(top);
      const float shift = softmax_shift(top) * factor;
      rescale[h] = exp2_approx(fmaf(maximum[h], factor, -shift));
      maximum[h] = top;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount / 4; j++) {
        float& a = s[4 * j + 2 * h];
        float& b = s[4 * j + 2 * h + 1];
        a = exp2_approx(fmaf(a, factor, -shift));
        b = exp2_approx(fmaf(b, factor, -shift));
        added += a + b;
      }
      sum[h] = sum[h] * rescale[h] + added;
    }
  }
};

}  // namespace gqa::cuda::sm90
