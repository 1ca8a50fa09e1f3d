// Entry point of `keep` on the CPU: move the rows of the kept keys to the front of their sequence.
// Torch-free: threads come in from the caller.
#pragma once

#include "../../core/params.h"
#include "../thread_pool.h"

namespace gqa::cpu {

// K's or V's memory. Scales and zeros: one for each row, or nullptr: nothing to move.
struct KeptSide {
  void* data;
  float *scale, *zero;
  int64_t row_bytes, element_bytes;  // strides count elements
};

// Of `cache`, these fields count: the strides of k, v and their scales and zeros, lengths, pages,
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

void cache_keep(const KeepParams& params, const ThreadPool& pool);

}  // namespace gqa::cpu
