// From dot products to probabilities, in the registers of a warp: softcap, ALiBi, masks, hidden
// keys, online softmax.
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
#include "args.h"
#include "config.h"

namespace gqa::cuda::sm80 {

// attn_mask where its elements are of type `Element`: `value` makes of one what is added to a
// base-2 score.
template <class Element, class C, class F>
__device__ __forceinline__ void add_mask(Scores<C>& scores, const PrefillArgs& args,
                                         const QueryTile& tile, int warp_token, int first_key,
                                         F value) {
  const AttentionParams& params = args.params;
  const int keys = tile.length - first_key;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane_token(warp_token, m, h);
      if (token >= tile.q_len) continue;
      const Element* row = static_cast<const Element*>(params.attn_mask) +
                           tile.b * params.mask_stride_b + tile.head * params.mask_stride_h +
                           token * params.mask_stride_q + first_key * params.mask_stride_k;
#pragma unroll
      for (int n = 0; n < C::kBlockN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = lane_key(n, e);
          if (key >= keys) continue;
          const float added = value(row[key * params.mask_stride_k]);
          // Selected instead of added, because the score of a hidden key may be NaN.
          float& x = scores[m][n][h * 2 + e];
          x = added == minus_infinity() ? added : x + added;
        }
      }
    }
  }
}

// Turns dot products into base-2 scores: scale, softcap, ALiBi, masks.
template <class T, class C>
__device__ __forceinline__ void modify_scores(Scores<C>& scores, const PrefillArgs& args,
                                              const QueryTile& tile, int warp_token,
                                              int first_key) {
  const AttentionParams& params = args.params;
  if (params.softcap == 0.0f) {
    const float scale = params.scale * kLog2e;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < C::kBlockN / 2; ++i) scores[m][i / 4][i % 4] *= scale;
    }
  } else {
    const float inner = params.scale / params.softcap, outer = params.softcap * kLog2e;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < C::kBlockN / 2; ++i) {
        float& x = scores[m][i / 4][i % 4];
        x = outer * tanh_fast(inner * x);
      }
    }
  }
  if (params.alibi_slopes != nullptr) {
    const float slope =
        kLog2e *
        params.alibi_slopes[tile.b * params.alibi_stride_b + tile.head * params.alibi_stride_h];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int position = lane_token(warp_token, m, h) + tile.length - tile.q_len;
        const float distance = static_cast<float>(first_key + lane_key(0, 0) - position);
#pragma unroll
        for (int i = 0; i < C::kBlockN / 4; ++i) {
          float& x = scores[m][i / 2][h * 2 + i % 2];
          x = fmaf(-slope, fabsf(distance + (i / 2 * 8 + i % 2)), x);
        }
      }
    }
  }
  if (params.attn_mask == nullptr) return;
  switch (params.mask_dtype) {
    case DType::kBool:
      add_mask<uint8_t, C>(scores, args, tile, warp_token, first_key,
                           [](uint8_t visible) { return visible ? 0.0f : minus_infinity(); });
      break;
    case DType::kFloat32:
      add_mask<float, C>(scores, args, tile, warp_token, first_key,
                         [](float x) { return additive_mask_score(x); });
      break;
    default:
      add_mask<T, C>(scores, args, tile, warp_token, first_key,
                     [](T x) { return additive_mask_score(to_float(x)); });
  }
}

// Zeros for the probabilities that dropout drops.
template <class C>
__device__ __forceinline__ void drop_keys(Probabilities<C>& p, const AttentionParams& params,
                                          const QueryTile& tile, int warp_token, int first_key) {
  const uint32_t head = dropout_head(params, tile.b, tile.head);
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const KeptKeys<C> kept = kept_keys<C>(params, head, lane_token(warp_token, m, h), first_key);
#pragma unroll
      for (int n = 0; n < C::kBlockN / 8; ++n) {
        p[m][n / 2][n % 2 * 2 + h] &=
            (kept.at(n, 0) ? 0x0000ffffu : 0u) | (kept.at(n, 1) ? 0xffff0000u : 0u);
      }
    }
  }
}

// The online softmax of a warp's rows; rows are as in Scores.
template <class C>
struct RowState {
  // What exponents are relative to, in base-2 units: the maximum as of the last rescaling; -inf: no
  // key was seen yet.
  float shift[C::kRowTiles][2];
  float sum[C::kRowTiles][2];  // of P, over this lane's columns

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shift[m][h] = minus_infinity();
        sum[m][h] = 0.0f;
      }
    }
  }

  // P = 2^(scale * score - shift), rounded to T; what was summed before is brought to the same
  // shift. `scale` > 0.
  template <class T>
  __device__ __forceinline__ void update(Probabilities<C>& p, const Scores<C>& scores,
                                         Output<C>& output, float scale) {
    // P may exceed 1 by this many binary orders of magnitude before O is rescaled.
    constexpr float kSlack = 8.0f;
    float maximum[C::kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(scores[m][0][h * 2], scores[m][0][h * 2 + 1]);
#pragma unroll
        for (int n = 1; n < C::kBlockN / 8; ++n) {
          x = fmaxf(x, fmaxf(scores[m][n][h * 2], scores[m][n][h * 2 + 1]));
        }
        maximum[m][h] = quad_max(x);
        // False for -inf - -inf: a row that has seen nothing stays as it is.
        grown |= fmaf(maximum[m][h], scale, -shift[m][h]) > kSlack;
      }
    }
    if (__any_sync(~0u, grown)) rescale(maximum, output, scale);
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float minus_shift = -softmax_shift(shift[m][h]);
#pragma unroll
        for (int n = 0; n < C::kBlockN / 8; ++n) {
          const float left = exp2_approx(fmaf(scores[m][n][h * 2], scale, minus_shift));
          const float right = exp2_approx(fmaf(scores[m][n][h * 2 + 1], scale, minus_shift));
          sum[m][h] += left;
          sum[m][h] += right;
          p[m][n / 2][n % 2 * 2 + h] = pack<T>(left, right);
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&maximum)[C::kRowTiles][2],
                                          Output<C>& output, float scale) {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float larger = fmaxf(shift[m][h], maximum[m][h] * scale);
        const float factor = exp2_approx(shift[m][h] - softmax_shift(larger));
        shift[m][h] = larger;
        sum[m][h] *= factor;
#pragma unroll
        for (int d = 0; d < C::kD / 8; ++d) {
          output[m][d][h * 2] *= factor;
          output[m][d][h * 2 + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace gqa::cuda::sm80
