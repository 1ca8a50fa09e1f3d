// What one backward call computes, without Torch; see params.h.
#pragma once

#include "params.h"

namespace gqa {

struct BackwardParams {
  AttentionParams call;  // the forward call; its out and lse are read only
  const void* dout;      // [B, Hq, Sq, Dv], last dim contiguous
  const float* dlse;     // [B, Hq, Sq], contiguous, or nullptr: 0
  void* dq;              // [B, Hq, Sq, D], dtype of q; likewise dk and dv
  void* dk;              // [B, Hk, Sk, D]
  void* dv;              // [B, Hv, Sk, Dv]
  Strides dout_stride, dq_stride, dk_stride, dv_stride;
  float* dslopes;  // [B, Hq], contiguous, or nullptr: not wanted
  float* dsinks;   // [Hq], contiguous, or nullptr
};

}  // namespace gqa
