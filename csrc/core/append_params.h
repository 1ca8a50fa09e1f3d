// The description of one append to a cache, without Torch. Every pointer has its shape.
#pragma once

#include "params.h"

namespace gqa {

// Appends up to S new tokens to each of B sequences. Token i of sequence b goes to slot kv_begin[b]
// + length + i of each head, in memory that `cache` describes as AttentionParams does. Tokens
// without a slot or a page are dropped. These fields of `cache` are used: the strides of k, v and
// their scales and zeros, lengths (before the append), pages, kv_begin, the numbers of sequences
// and heads, head dims and dtypes.
struct AppendParams {
  AttentionParams cache;
  void *k, *v;                                 // the cache's memory
  float *k_scale, *v_scale, *k_zero, *v_zero;  // if the cache is quantised, else nullptr
  bool k_dynamic, v_dynamic;  // whether each row's scale and zero are computed and written

  const void* q;      // [B, Hq, S, D] or nullptr: queries to rotate
  void* q_rotated;    // [B, Hq, S, D]
  const void* k_new;  // [B, Hk, S, D]
  const void* v_new;  // [B, Hv, S, Dv]
  Strides q_stride, q_rotated_stride, k_new_stride, v_new_stride;
  // Ragged tokens: [B + 1]. Tokens new_offsets[b] to new_offsets[b + 1] belong to sequence b, and
  // q, k_new and v_new have the shape of one sequence of all tokens. nullptr: not ragged.
  const int32_t* new_offsets;
  int64_t num_tokens;  // S, or all tokens
  DType dtype;         // of q, k_new and v_new

  // Rotates the first rotary_dim elements of each row of q and k_new by the angle of the token's
  // position. A position beyond the table uses its last row.
  const void *rotary_cos, *rotary_sin;  // [rotary_positions, rotary_dim / 2] or nullptr
  int64_t cos_stride, sin_stride;       // from row to row; rows are contiguous
  int64_t rotary_positions, rotary_dim;
  DType cos_dtype, sin_dtype;
  bool rotary_interleaved;  // pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2)
};

}  // namespace gqa
