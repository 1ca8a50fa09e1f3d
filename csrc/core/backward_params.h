// What one backward call computes, without Torch; see params.h.
#pragma once

#include "params.h"

namespace gqa {

struct BackwardParams {
  // The forward call; its out and lse are read only. Where queries are ragged (q_offsets), keys are
  // those of packed sequences: sequence b has kv_lengths[b] from slot kv_begin[b] on.
  AttentionParams call;
  int64_t max_kv_len;  // most keys of a sequence: Sk, or fewer where sequences are packed
  const void* dout;    // as out; last dim contiguous
  const float* dlse;   // as lse, contiguous, or nullptr: 0
  // As q, k and v, in the dtype of q. Packed sequences' tokens of no sequence are not written.
  void *dq, *dk, *dv;
  Strides dout_stride, dq_stride, dk_stride, dv_stride;
  float* dslopes;  // [B, Hq], contiguous, or nullptr: not wanted
  float* dsinks;   // [Hq], contiguous, or nullptr
};

}  // namespace gqa
