// The description of one backward call, without Torch; see params.h.
#pragma once

#include "params.h"

namespace gqa {

struct BackwardParams {
  // The forward call. Its out and lse are only read. If queries are ragged (q_offsets), so are
  // keys: sequence b has kv_lengths[b] keys from slot kv_begin[b] on.
  AttentionParams call;
  int64_t max_kv_len;  // most keys of a sequence: Sk, or less if sequences are packed
  const void* dout;    // shaped like out; last dim contiguous
  const float* dlse;   // shaped like lse, contiguous; nullptr: zeros
  // Shaped like q, k and v, in q's dtype. Tokens that belong to no packed sequence are not written.
  void *dq, *dk, *dv;
  Strides dout_stride, dq_stride, dk_stride, dv_stride;
  float* dslopes;  // [B, Hq], contiguous; nullptr: not requested
  float* dsinks;   // [Hq], contiguous, or nullptr
};

}  // namespace gqa
