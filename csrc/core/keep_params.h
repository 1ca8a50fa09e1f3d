// The description of one `keep`, without Torch. Every pointer has its shape.
#pragma once

#include "params.h"

namespace gqa {

// K's or V's memory. Scales and zeros: one for each row, or nullptr: nothing to move.
struct KeptSide {
  void* data;
  float *scale, *zero;
  int64_t row_bytes, element_bytes;  // strides count elements
};

// Of `cache`, these fields are used: the strides of k, v and their scales and zeros, lengths, pages,
// kv_begin, and the numbers of sequences and heads. Key indices[b, h, i] becomes key i, for i below
// counts[b, h]. Indices ascend, so a row is read before it is overwritten. A move from or to a row
// that does not exist is left out.
struct KeepParams {
  AttentionParams cache;
  KeptSide k, v;
  const int32_t* indices;  // [B, Hk, n]
  int64_t index_stride_b, index_stride_h, index_stride_n, num_indices;
  const int32_t* counts;  // [B, Hk]
  int64_t count_stride_b, count_stride_h;
};

}  // namespace gqa
