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
  float slope;          // 0: no ALiBi
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
      row.slope = params.alibi_slopes[b * params.alibi_stride_b + head * params.alibi_stride_h];
    }
    if (params.attn_mask) {
      const int64_t at =
          b * params.mask_stride_b + head * params.mask_stride_h + token * params.mask_stride_q;
      row.mask = static_cast<const uint8_t*>(params.attn_mask) + at * mask_bytes(params.mask_dtype);
    }
  }
  return row;
}

// A score of `row` for `key`; -inf where it does not see the key. Plain variants leave the scale to
// the softmax; the others return it in base 2.
template <bool kPlain>
__device__ __forceinline__ float modified_score(const AttentionParams& params, const DecodeRow& row,
                                                int key, float score) {
  if (key < row.begin || key >= row.end) return minus_infinity();
  if constexpr (kPlain) return score;
  score *= params.scale;
  if (params.softcap != 0.f) score = params.softcap * tanh_fast(score / params.softcap);
  score -= row.slope * static_cast<float>(abs(row.position - key));
  if (row.mask != nullptr) {
    const DType dtype = params.mask_dtype;
    const float value =
        mask_value(row.mask + key * params.mask_stride_k * mask_bytes(dtype), dtype);
    // A hidden key is hidden even where its score is NaN.
    score = value == minus_infinity() ? value : score + value;
  }
  return score * kLog2e;
}

}  // namespace gqa::cuda::sm80
