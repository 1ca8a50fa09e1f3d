// What one attention call computes, without Torch: every pointer with its shape, every stride in
// elements. The last dim of q, k, v and out is contiguous. Tensors are read through strides, never
// copied.
#pragma once

#include <cstdint>

namespace gqa {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kBool };

// 16-bit floating-point numbers as they lie in memory; arithmetic is in fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Strides of a [B, H, S, D] tensor without its last one (1).
struct Strides {
  int64_t b, h, s;
};

// B sequences, Hq query heads, Hk key heads, Hv value heads, Sq query tokens, Sk key tokens.
struct AttentionParams {
  const void* q;  // [B, Hq, Sq, D]
  const void* k;  // [B, Hk, Sk, D]
  const void* v;  // [B, Hv, Sk, Dv]
  void* out;      // [B, Hq, Sq, Dv]
  float* lse;     // [B, Hq, Sq], contiguous; natural log
  Strides q_stride, k_stride, v_stride, out_stride;

  const int32_t* head_map;        // [Hq]: key head of each query head
  const int32_t* value_head_map;  // [Hq]: value head of each query head; nullptr: head_map

  const float* alibi_slopes;  // [B, Hq] or nullptr
  int64_t alibi_stride_b, alibi_stride_h;
  const float* sinks;     // [Hq], contiguous, or nullptr
  const void* attn_mask;  // [B, Hq, Sq, Sk] or nullptr; bool: visible; float: added to the score
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const int32_t* kv_lengths;  // [B, Hk] or nullptr; clamped to [0, Sk]
  int64_t kv_lengths_stride_b, kv_lengths_stride_h;

  int64_t batch, num_heads, num_k_heads, num_v_heads;  // B, Hq, Hk, Hv
  int64_t q_len, kv_len, head_dim, value_head_dim;     // Sq, Sk, D, Dv

  float scale;
  float softcap;                      // 0: off
  int64_t window_left, window_right;  // keys a query sees on either side; < 0: unbounded
  DType dtype;                        // of q, k, v and out
  DType mask_dtype;                   // of attn_mask

  uint32_t dropout_threshold;  // floor(dropout_p * 2^32), see dropout.h; 0: no dropout
  float dropout_scale;         // 1 / (1 - dropout_p)
  uint64_t dropout_seed;
  uint32_t dropout_offset;
};

}  // namespace gqa
