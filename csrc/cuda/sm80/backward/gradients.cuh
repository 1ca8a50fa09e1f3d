// From dot products to P and dS, in the registers of a warp:
//
//   P = 2^(score - LSE)      dS = P * (dP - delta), times the softcap's derivative
//
// Both are rounded to the input type for the products they go into, as the forward rounds P
// (FlashAttention-2, Dao 2023, algorithm 2). The scale of dS is left to the sums of the products.
// What dropout drops is 0 in dP, and in the P that dV is made of, whose scale is left to the sum.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/mask.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../dropout.cuh"
#include "../hidden_keys.cuh"
#include "../products.cuh"
#include "../query_tile.cuh"
#include "args.h"
#include "config.h"
#include "kv_walk.cuh"

namespace gqa::cuda::sm80 {

struct ElementGradient {
  float p, ds;
};

// A lane's sums over a token's keys, for the gradients of the head's ALiBi slope (sum of dS *
// -distance, dS before the softcap's derivative) and its sink (minus its probability times delta).
// Their delta is summed again. The one of RowNumbers comes from the stored output, whose rounding
// would show here: these sums add up whole rows, whose dS cancel to about 0.
struct RowSums {
  float dp;           // P * dP
  float distance;     // P * distance
  float dp_distance;  // P * dP * distance

  __device__ __forceinline__ void add(float p, float dp_of_key, float distance_to_key) {
    const float p_dp = p * dp_of_key;
    dp += p_dp;
    distance = fmaf(p, distance_to_key, distance);
    dp_distance = fmaf(p_dp, distance_to_key, dp_distance);
  }
};

// P and dS of one score, in a row whose softmax needs only a scale; `dot` is -inf if the row does
// not see the key.
__device__ __forceinline__ ElementGradient plain_gradient(const BackwardArgs& args, float dot,
                                                          float dp, const RowNumbers& numbers) {
  const float p = exp2_approx(fmaf(dot, args.softmax_scale, -numbers.lse));
  return {p, p * (dp - numbers.delta)};
}

// The same with softcap, ALiBi, masks and any scale.
template <class T>
__device__ __forceinline__ ElementGradient general_gradient(const BackwardArgs& args, float dot,
                                                            float dp, const RowNumbers& numbers,
                                                            const ScoreRow& row, int key) {
  const AttentionParams& call = args.params.call;
  ElementGradient x;
  x.p = exp2_approx(modified_score<T>(call, row, key, dot) - numbers.lse);
  x.ds = x.p * (dp - numbers.delta);
  if (call.softcap != 0.0f) {
    const float tanh = tanh_fast(dot * (call.scale / call.softcap));
    x.ds *= fmaf(-tanh, tanh, 1.0f);
  }
  return x;
}

// The row of a query token; past the last token, one that sees nothing.
__device__ __forceinline__ ScoreRow token_row(const AttentionParams& call, int b, int head,
                                              int token, int q_len, int length) {
  ScoreRow row = score_row(call, b, head, token, q_len, length);
  if (token >= q_len) row.end = 0;
  return row;
}

// Rows are keys, `first_key` on; columns the tokens of a step: -inf where these do not see those.
template <class C>
__device__ __forceinline__ void hide_from_tokens(Scores<C>& scores, const AttentionParams& call,
                                                 const KvTile& tile, const KvStep& step,
                                                 int first_key) {
  first_key += static_cast<int>(threadIdx.x % 32 / 4);
#pragma unroll
  for (int i = 0; i < C::kBlockN / 4; ++i) {
    const int token = step.token + lane_key(i / 2, i % 2);
    const KeyRange keys = keys_around(call, step.length, token + step.length - tile.q_len);
    const int begin = static_cast<int>(keys.begin) - first_key;
    const int end = static_cast<int>(keys.end) - first_key;
#pragma unroll
    for (int row = 0; row < C::kRowTiles * 16; row += 8) {
      if (row < begin || row >= end)
        scores[row / 16][i / 2][row / 8 % 2 * 2 + i % 2] = minus_infinity();
    }
  }
}

// The same rows and columns; the tokens' RowNumbers are at `numbers`. In the plain kernel, hidden
// keys' scores are -inf already.
template <class T, class C, bool kGeneral>
__device__ __forceinline__ void gradients_by_key(Probabilities<C>& p, Probabilities<C>& ds,
                                                 const Scores<C>& scores, const Scores<C>& dp,
                                                 const BackwardArgs& args, const KvTile& tile,
                                                 const KvStep& step, int first_key,
                                                 uint32_t numbers) {
  first_key += static_cast<int>(threadIdx.x % 32 / 4);
  const AttentionParams& call = args.params.call;
  const bool drops = kGeneral && call.dropout_threshold != 0;
  KeptTokens<C> kept[C::kRowTiles][2];
  if (drops) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles * 2; ++i) {
      kept[i / 2][i % 2] = kept_tokens<C>(call, dropout_head(call, tile.b, step.head), step.token,
                                          first_key + i * 8);
    }
  }
#pragma unroll
  for (int n = 0; n < C::kBlockN / 8; ++n) {
    const int column = lane_key(n, 0);
    const float4 x = ld_shared_v4(numbers + column * static_cast<int>(sizeof(RowNumbers)));
    const RowNumbers of_token[2] = {{x.x, x.y}, {x.z, x.w}};
    ScoreRow rows[2];
    if constexpr (kGeneral) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        rows[e] =
            token_row(call, tile.b, step.head, step.token + column + e, tile.q_len, step.length);
      }
    }
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ElementGradient of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float dot = scores[m][n][h * 2 + e];
          float dp_e = dp[m][n][h * 2 + e];
          if (drops) dp_e = kept[m][h].at(n, e) ? dp_e * call.dropout_scale : 0.0f;
          if constexpr (kGeneral) {
            const int key = first_key + m * 16 + h * 8;
            of[e] = general_gradient<T>(args, dot, dp_e, of_token[e], rows[e], key);
          } else {
            of[e] = plain_gradient(args, dot, dp_e, of_token[e]);
          }
          if (drops && !kept[m][h].at(n, e)) of[e].p = 0.0f;
        }
        p[m][n / 2][n % 2 * 2 + h] = pack<T>(of[0].p, of[1].p);
        ds[m][n / 2][n % 2 * 2 + h] = pack<T>(of[0].ds, of[1].ds);
      }
    }
  }
}

// Rows are tokens, `warp_token` on; columns keys, `first_key` on, hidden ones already -inf in the
// plain kernel. kSums: adds to `sums`; in the plain kernel, which has no slopes, to dp.
template <class T, class C, bool kGeneral, bool kSums>
__device__ __forceinline__ void gradients_by_token(Probabilities<C>& ds,
                                                   RowSums (&sums)[C::kRowTiles][2],
                                                   const Scores<C>& scores, const Scores<C>& dp,
                                                   const BackwardArgs& args, const QueryTile& tile,
                                                   int warp_token, int first_key,
                                                   const RowNumbers (&numbers)[C::kRowTiles][2]) {
  const AttentionParams& call = args.params.call;
  const bool drops = kGeneral && call.dropout_threshold != 0;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane_token(warp_token, m, h);
      ScoreRow row;
      if constexpr (kGeneral) {
        row = token_row(call, tile.b, tile.head, token, tile.q_len, tile.length);
      }
      KeptKeys<C> kept;
      if (drops) {
        kept = kept_keys<C>(call, dropout_head(call, tile.b, tile.head), token, first_key);
      }
#pragma unroll
      for (int n = 0; n < C::kBlockN / 8; ++n) {
        ElementGradient of[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float dot = scores[m][n][h * 2 + e];
          float dp_e = dp[m][n][h * 2 + e];
          if (drops) dp_e = kept.at(n, e) ? dp_e * call.dropout_scale : 0.0f;
          if constexpr (kGeneral) {
            const int key = first_key + lane_key(n, e);
            of[e] = general_gradient<T>(args, dot, dp_e, numbers[m][h], row, key);
            sums[m][h].add(of[e].p, dp_e, static_cast<float>(abs(row.position - key)));
          } else {
            of[e] = plain_gradient(args, dot, dp_e, numbers[m][h]);
            if constexpr (kSums) sums[m][h].dp = fmaf(of[e].p, dp_e, sums[m][h].dp);
          }
        }
        ds[m][n / 2][n % 2 * 2 + h] = pack<T>(of[0].ds, of[1].ds);
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
