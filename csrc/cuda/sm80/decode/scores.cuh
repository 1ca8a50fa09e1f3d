// Scores of one warp's 16 rows x 16 keys, in the registers of an mma accumulator.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/mma.cuh"
#include "../../common/softmax.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// One of a lane's two rows: which keys it sees, and its options.
struct DecodeRow {
  int begin, end;  // keys
  // General variants only:
  int position;
  float slope;          // of ALiBi, times log2(e)
  const uint8_t* mask;  // key 0 of its row of the mask, or nullptr
};

__device__ __forceinline__ float mask_value(const uint8_t* at, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return to_float(*reinterpret_cast<const BFloat16*>(at));
    case DType::kFloat16: return to_float(*reinterpret_cast<const Float16*>(at));
    case DType::kFloat32: return *reinterpret_cast<const float*>(at);
    default: return *at ? 0.f : minus_infinity();
  }
}

__device__ __forceinline__ int mask_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

template <bool kPlain>
__device__ __forceinline__ DecodeRow decode_row(const AttentionParams& params, int b, int head,
                                                int token, int q_len, int length) {
  DecodeRow row{0, 0, 0, 0.f, nullptr};
  if (head < 0) return row;
  row.position = token + length - q_len;
  const KeyRange keys = keys_around(params, length, row.position);
  row.begin = static_cast<int>(keys.begin);
  row.end = static_cast<int>(keys.end);
  if constexpr (!kPlain) {
    if (params.alibi_slopes) {
      row.slope =
          kLog2e * params.alibi_slopes[b * params.alibi_stride_b + head * params.alibi_stride_h];
    }
    if (params.attn_mask) {
      const int64_t at =
          b * params.mask_stride_b + head * params.mask_stride_h + token * params.mask_stride_q;
      row.mask = static_cast<const uint8_t*>(params.attn_mask) + at * mask_bytes(params.mask_dtype);
    }
  }
  return row;
}

// Turns a lane's products q . k, accumulators of keys `key`, key + 1, key + 8 and key + 9, into
// scores: -inf if a row does not see the key. Plain variants leave the scale to the softmax; the
// others return scores in base 2.
template <bool kPlain>
__device__ __forceinline__ void modify_scores(const AttentionParams& params,
                                              const DecodeRow (&rows)[2], int key,
                                              float (&scores)[2][4]) {
  const auto each = [&](auto modify) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        modify(rows[h], key + (e >> 1) * 8 + (e & 1), scores[e >> 1][2 * h + (e & 1)]);
      }
    }
  };
  const auto hidden = [](const DecodeRow& row, int j) { return j < row.begin || j >= row.end; };
  if constexpr (!kPlain) {
    if (params.softcap == 0.f) {
      const float scale = params.scale * kLog2e;
      each([&](const DecodeRow&, int, float& x) { x *= scale; });
    } else {
      const float inner = params.scale / params.softcap, outer = params.softcap * kLog2e;
      each([&](const DecodeRow&, int, float& x) { x = outer * tanh_fast(inner * x); });
    }
    if (params.alibi_slopes != nullptr) {
      each([&](const DecodeRow& row, int j, float& x) {
        x = fmaf(-row.slope, static_cast<float>(abs(row.position - j)), x);
      });
    }
    if (params.attn_mask != nullptr) {
      const DType dtype = params.mask_dtype;
      const int64_t stride = params.mask_stride_k * mask_bytes(dtype);
      each([&](const DecodeRow& row, int j, float& x) {
        if (hidden(row, j)) return;
        const float value = mask_value(row.mask + j * stride, dtype);
        // A hidden key stays hidden even if its score is NaN.
        x = value < kLowestMaskValue ? minus_infinity() : fmaf(value, kLog2e, x);
      });
    }
  }
  each([&](const DecodeRow& row, int j, float& x) {
    if (hidden(row, j)) x = minus_infinity();
  });
}

}  // namespace gqa::cuda::sm80
