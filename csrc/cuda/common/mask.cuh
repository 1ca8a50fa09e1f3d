// Everything but Q K^T that determines a row's scores: visible keys, ALiBi, a mask. core/visible.h
// defines lengths, causal order and windows; this file applies them to single scores.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "mma.cuh"
#include "softmax.cuh"

namespace gqa::cuda {

// The keys that any token of a run sees, and the keys that all of them see.
struct TokenRange {
  int begin, end, all_begin, all_end;
};

// For tokens [first, first + count), cut to the sequence's `q_len`; `length` is the number of keys
// of (b, key head).
__device__ __forceinline__ TokenRange token_range(const AttentionParams& params, int length,
                                                  int q_len, int first, int count) {
  const int last = min(first + count, q_len) - 1, shift = length - q_len;
  if (last < first) return {0, 0, 0, 0};
  const KeyRange a = keys_around(params, length, first + shift);
  const KeyRange b = keys_around(params, length, last + shift);
  return {static_cast<int>(a.begin), static_cast<int>(b.end), static_cast<int>(b.begin),
          static_cast<int>(a.end)};
}

// One query row of one head.
struct ScoreRow {
  int begin, end;    // keys it sees by length, causal order and window
  int position;      // its place among the keys
  float slope;       // of ALiBi, times log2(e)
  int64_t mask_row;  // offset of its row of attn_mask
};

// `token` is one of the sequence's `count` query tokens; `length` is the keys of (b, key head).
__device__ __forceinline__ ScoreRow score_row(const AttentionParams& params, int b, int head,
                                              int token, int count, int length) {
  ScoreRow row;
  row.position = token + length - count;
  const KeyRange keys = keys_around(params, length, row.position);
  row.begin = static_cast<int>(keys.begin);
  row.end = static_cast<int>(keys.end);
  row.slope = 0.0f;
  if (params.alibi_slopes != nullptr) {
    row.slope =
        kLog2e * params.alibi_slopes[b * params.alibi_stride_b + head * params.alibi_stride_h];
  }
  row.mask_row =
      b * params.mask_stride_b + head * params.mask_stride_h + token * params.mask_stride_q;
  return row;
}

// What a value of an additive mask adds to a base-2 score; -inf if it hides the key.
__device__ __forceinline__ float additive_mask_score(float value) {
  return value < kLowestMaskValue ? minus_infinity() : kLog2e * value;
}

// What an element of attn_mask adds to a base-2 score; -inf if it hides the key.
template <class T>
__device__ __forceinline__ float mask_score(const AttentionParams& params, int64_t offset) {
  switch (params.mask_dtype) {
    case DType::kBool:
      return static_cast<const uint8_t*>(params.attn_mask)[offset] ? 0.0f : minus_infinity();
    case DType::kFloat32:
      return additive_mask_score(static_cast<const float*>(params.attn_mask)[offset]);
    default: return additive_mask_score(to_float(static_cast<const T*>(params.attn_mask)[offset]));
  }
}

// softcap * tanh(scale * dot / softcap), or scale * dot without softcap, in base-2 units.
__device__ __forceinline__ float scaled_score(const AttentionParams& params, float dot) {
  if (params.softcap == 0.0f) return dot * (params.scale * kLog2e);
  return params.softcap * kLog2e * tanh_fast(dot * (params.scale / params.softcap));
}

// The score of `row` for `key`, which is less than its sequence's length: softcap, ALiBi and mask;
// -inf if the row does not see the key.
template <class T>
__device__ __forceinline__ float modified_score(const AttentionParams& params, const ScoreRow& row,
                                                int key, float dot) {
  if (key < row.begin || key >= row.end) return minus_infinity();
  float score = scaled_score(params, dot);
  score -= row.slope * static_cast<float>(abs(row.position - key));
  if (params.attn_mask == nullptr) return score;
  const float added = mask_score<T>(params, row.mask_row + key * params.mask_stride_k);
  // Selected instead of added, because the score of a hidden key may be NaN.
  return added == minus_infinity() ? added : score + added;
}

}  // namespace gqa::cuda
