// Which keys a query token sees: the only definition of lengths, causal order and windows.
#pragma once

#include "host_device.h"
#include "params.h"

namespace gqa {

// An additive mask value below this hides its key: half of fp32's lowest number.
constexpr float kLowestMaskValue = -0x1.fffffep126f;

// Keys [begin, end); empty if begin >= end.
struct KeyRange {
  int64_t begin, end;
};

// The slot of sequence b's first key.
GQA_HOST_DEVICE inline int64_t first_slot(const AttentionParams& params, int64_t b) {
  if (params.kv_begin == nullptr) return 0;
  const int64_t begin = params.kv_begin[b];
  return begin < 0 ? 0 : begin > params.kv_len ? params.kv_len : begin;
}

// The number of valid keys of sequence b for key head k_head.
GQA_HOST_DEVICE inline int64_t kv_length(const AttentionParams& params, int64_t b, int64_t k_head) {
  const int64_t capacity = params.kv_len - first_slot(params, b);
  if (params.kv_lengths == nullptr) return capacity;
  const int64_t length =
      params.kv_lengths[b * params.kv_lengths_stride_b + k_head * params.kv_lengths_stride_h];
  return length < 0 ? 0 : length > capacity ? capacity : length;
}

// The query tokens of a sequence: tokens [first, first + count) of q, out and LSE in batch `b`.
struct Queries {
  int64_t b, first, count;
};

GQA_HOST_DEVICE inline Queries queries_of(const AttentionParams& params, int64_t b) {
  if (params.q_offsets == nullptr) return {b, 0, params.q_len};
  const int64_t first = params.q_offsets[b], count = params.q_offsets[b + 1] - first;
  return {0, first, count < 0 ? 0 : count > params.q_len ? params.q_len : count};
}

// The position of query token `token` among `length` keys. The last query token, number Sq - 1, is
// aligned to the last key. If queries are ragged, the first token of a shorter sequence has a
// number above 0.
GQA_HOST_DEVICE inline int64_t query_position(const AttentionParams& params, int64_t length,
                                              int64_t token) {
  return token + length - params.q_len;
}

// The keys that a query at `position` among `length` keys sees.
GQA_HOST_DEVICE inline KeyRange keys_around(const AttentionParams& params, int64_t length,
                                            int64_t position) {
  KeyRange range{0, length};
  if (params.window_left >= 0 && position - params.window_left > 0) {
    range.begin = position - params.window_left;
  }
  if (params.window_right >= 0 && position + params.window_right + 1 < length) {
    range.end = position + params.window_right + 1;
  }
  return range;
}

// Both ends grow with the token, so a run of tokens sees keys first.begin to last.end.
GQA_HOST_DEVICE inline KeyRange visible_keys(const AttentionParams& params, int64_t length,
                                             int64_t token) {
  return keys_around(params, length, query_position(params, length, token));
}

}  // namespace gqa
