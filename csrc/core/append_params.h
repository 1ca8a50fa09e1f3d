// What one append to a cache computes, without Torch: every pointer with its shape.
#pragma once

#include "params.h"

namespace gqa {

// S new tokens of each of B sequences go behind those they have: token i of sequence b to slot
// kv_begin[b] + length + i of each head, where `cache` describes the memory as AttentionParams
// does. What has no slot or no page is dropped. Of `cache`, these fields count: the strides of k, v
// and their scales and zeros, lengths (before the append), pages, kv_begin, the numbers of
// sequences and heads, head dims and dtypes.
struct AppendParams {
  AttentionParams cache;
  void *k, *v;                                 // the cache's memory
  float *k_scale, *v_scale, *k_zero, *v_zero;  // of a quantised cache, or nullptr
  bool k_dynamic, v_dynamic;  // scales and zeros are found for each row and written, not used

  const void* q;      // [B, Hq, S, D] or nullptr; read only to be rotated
  void* q_rotated;    // [B, Hq, S, D]
  const void* k_new;  // [B, Hk, S, D]
  const void* v_new;  // [B, Hv, S, Dv]
  Strides q_stride, q_rotated_stride, k_new_stride, v_new_stride;
  // Ragged: [B + 1], tokens new_offsets[b] to new_offsets[b + 1] are sequence b's, and q, k_new and
  // v_new have the shape of one sequence of all tokens. nullptr: not so.
  const int32_t* new_offsets;
  int64_t num_tokens;  // S, or all tokens
  DType dtype;         // of q, k_new and v_new

  // The first rotary_dim numbers of q's and k_new's rows are turned by the angle of the token's
  // position among the sequence's keys; beyond the table by that of its last row.
  const void *rotary_cos, *rotary_sin;  // [rotary_positions, rotary_dim / 2] or nullptr
  int64_t cos_stride, sin_stride;       // from row to row; rows are contiguous
  int64_t rotary_positions, rotary_dim;
  DType cos_dtype, sin_dtype;
  bool rotary_interleaved;  // pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2)
};

}  // namespace gqa
