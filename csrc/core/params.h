// What one attention call computes, without Torch: every pointer with its shape, every stride in
// elements. The last dim of q, k, v and out is contiguous. Tensors are read through strides, never
// copied.
#pragma once

#include <cstdint>

namespace gqa {

// On functions that CUDA kernels call too.
#ifdef __CUDACC__
#define GQA_HOST_DEVICE __host__ __device__
#else
#define GQA_HOST_DEVICE
#endif

enum class DType : int32_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kBool,
  kFloat8E4M3,
  kFloat8E5M2,
  kInt8,
  kInt4,  // two in a byte: element 2i in the low half
};

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

  // Where a cache keeps K and V. With a page table k and v are storage, [P, H, page_size, dim], and
  // kv_len is the slots a sequence has, max_pages * page_size. Key j of (b, h) is slot kv_begin[b]
  // + j of sequence b; that is slot % page_size of page page_table[b, h, slot / page_size]. V uses
  // the table of its key head. A page outside [0, P) is not read: rows that see its keys are NaN.
  const int32_t* page_table;  // [B, Hk, max_pages] or nullptr: sequence b is k[b], v[b]
  int64_t page_table_stride_b, page_table_stride_h, page_table_stride_p;
  int64_t num_pages, page_size, max_pages;  // P, and slots of a page, pages of a sequence
  const int32_t* kv_begin;                  // [B] or nullptr: 0
  // Queries of sequence b are tokens q_offsets[b] to q_offsets[b + 1] of a q (and out and lse) of
  // batch 1; q_len is the most that a sequence has.
  const int32_t* q_offsets;  // [B + 1] or nullptr
  // Quantised K and V: value = (stored - zero) * scale, zero being 0 (8 for int4) where not given.
  DType k_dtype, v_dtype;                            // of the storage
  const float *k_scale, *v_scale, *k_zero, *v_zero;  // [P, H, page_size] or nullptr
  Strides k_scale_stride, v_scale_stride, k_zero_stride, v_zero_stride;
};

}  // namespace gqa
