// The keys that a caller lets each query see, besides those that lengths, causality and windows hide.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/visible.h"

namespace gqa::cpu {

// The number of a query token in its sequence, from 0: the row of its mask and of its key range.
// (Elsewhere tokens are numbered so that the last one of every sequence is Sq - 1.)
inline int64_t query_number(const AttentionParams& params, int64_t b, int64_t token) {
  if (params.q_offsets == nullptr) return token;
  return token + params.q_offsets[b + 1] - params.q_offsets[b] - params.q_len;
}

// [B, Hq, Sq, 2], the last dim contiguous: the first key and the one behind the last. Without data
// a query sees all keys.
struct KeyRanges {
  const int32_t* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_q = 0;

  // The part of `keys` in the range of a query, by its number.
  KeyRange within(KeyRange keys, int64_t b, int64_t h, int64_t query) const {
    if (data == nullptr) return keys;
    const int32_t* range = data + b * stride_b + h * stride_h + query * stride_q;
    return {std::max<int64_t>(keys.begin, range[0]), std::min<int64_t>(keys.end, range[1])};
  }
};

}  // namespace gqa::cpu
