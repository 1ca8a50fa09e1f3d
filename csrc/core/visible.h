// Which keys a query token sees: the one definition of lengths, causal order and windows.
#pragma once

#include "params.h"

namespace gqa {

// Keys [begin, end); empty where begin >= end.
struct KeyRange {
  int64_t begin, end;
};

// Keys of sequence b that are valid for key head k_head.
inline int64_t kv_length(const AttentionParams& params, int64_t b, int64_t k_head) {
  if (params.kv_lengths == nullptr) return params.kv_len;
  const int64_t length =
      params.kv_lengths[b * params.kv_lengths_stride_b + k_head * params.kv_lengths_stride_h];
  const int64_t room =
      params.kv_begin == nullptr ? params.kv_len : params.kv_len - params.kv_begin[b];
  return length < 0 ? 0 : length > room ? room : length;
}

// The place of query token `token` among `length` keys: the last query token, number Sq - 1, is
// aligned to the last key. (Of ragged queries too: a shorter sequence's first token is not number
// 0.)
inline int64_t query_position(const AttentionParams& params, int64_t length, int64_t token) {
  return token + length - params.q_len;
}

// Both ends grow with the token, so the union over a run of tokens is first.begin to last.end.
inline KeyRange visible_keys(const AttentionParams& params, int64_t length, int64_t token) {
  const int64_t position = query_position(params, length, token);
  KeyRange range{0, length};
  if (params.window_left >= 0 && position - params.window_left > 0) {
    range.begin = position - params.window_left;
  }
  if (params.window_right >= 0 && position + params.window_right + 1 < length) {
    range.end = position + params.window_right + 1;
  }
  return range;
}

}  // namespace gqa
