// The description of one attention call, without Torch. Every pointer has its shape, and every
// stride is in elements. The last dim of q, k, v and out is contiguous. Kernels read tensors
// through their strides and never copy them.
#pragma once

#include <cstdint>

namespace gqa {

// kInt4 stores two numbers in a byte: element 2i is in the low half of byte i.
enum class DType : int32_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kBool,
  kFloat8E4M3,  // the "fn" format: no infinities, NaN where all other bits are ones
  kFloat8E5M2,
  kInt8,
  kInt4
};
constexpr int kNumDTypes = 8;

// Whether a cache stores numbers in a quantised type instead of the queries' type.
constexpr bool is_quantized(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2 || dtype == DType::kInt8 ||
         dtype == DType::kInt4;
}

// 16-bit floating-point numbers as stored. Arithmetic is in fp32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Quantised numbers as a cache stores them.
struct Float8E4M3 {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};
struct Int8 {
  int8_t value;
};
struct Int4Pair {
  uint8_t bits;  // the first number in the low half
};

// Numbers per element of storage.
template <class S>
inline constexpr int kNumbersPerElement = 1;
template <>
inline constexpr int kNumbersPerElement<Int4Pair> = 2;

// Strides of a [B, H, S, D] tensor without its last one, which is 1; or of a [P, H, slots] tensor.
struct Strides {
  int64_t b, h, s;
};

// B sequences, Hq query heads, Hk key heads, Hv value heads, Sq query tokens, Sk key tokens.
//
// K and V lie in P pages of page_size slots. Key j of sequence b and key head h is in slot s =
// kv_begin[b] + j of the sequence: slot s % page_size of page page_table[b, h, s / page_size]. Its
// value is at the same place of V's pages. A dense cache has one page per sequence, of Sk slots,
// and no table. Kernels check page ids when they use them: a row that sees a key on an invalid page
// is NaN.
struct AttentionParams {
  const void* q;  // [B, Hq, Sq, D]
  const void* k;  // [P, Hk, page_size, D], in k_dtype
  const void* v;  // [P, Hv, page_size, Dv], in v_dtype
  void* out;      // [B, Hq, Sq, Dv]
  float* lse;     // [B, Hq, Sq], contiguous; natural log
  Strides q_stride, k_stride, v_stride, out_stride;

  const int32_t* head_map;        // [Hq]: key head of each query head
  const int32_t* value_head_map;  // [Hq]: value head of each query head; nullptr: head_map

  const float* alibi_slopes;  // [B, Hq] or nullptr
  int64_t alibi_stride_b, alibi_stride_h;
  const float* sinks;     // [Hq], contiguous, or nullptr
  const void* attn_mask;  // [B, Hq, Sq, Sk] or nullptr; bool: visible; float: bias
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const int32_t* kv_lengths;  // [B, Hk] or nullptr; clamped to [0, Sk - kv_begin]
  int64_t kv_lengths_stride_b, kv_lengths_stride_h;

  int64_t batch, num_heads, num_k_heads, num_v_heads;  // B, Hq, Hk, Hv
  int64_t q_len, kv_len, head_dim, value_head_dim;     // Sq, Sk, D, Dv

  float scale;
  float softcap;                      // 0: off
  int64_t window_left, window_right;  // keys a query sees on either side; < 0: unbounded
  DType dtype;                        // of q and out
  DType mask_dtype;                   // of attn_mask

  const int32_t* page_table;  // [B, Hk, max_pages]; nullptr: page b of sequence b
  int64_t page_table_stride_b, page_table_stride_h, page_table_stride_p;
  int64_t num_pages, page_size, max_pages;  // num_pages is P; max_pages is 1 without a table
  const int32_t* kv_begin;                  // [B], slot of the first key; nullptr: 0
  // Ragged queries: [B + 1]. Tokens q_offsets[b] to q_offsets[b + 1] belong to sequence b. q, out
  // and lse then have the shape of one sequence of all tokens, and Sq is the longest. nullptr: not
  // ragged.
  const int32_t* q_offsets;
  int64_t q_tokens;        // tokens of q, out and lse: Sq, or all if ragged
  DType k_dtype, v_dtype;  // dtype, or a quantised type: value = (stored - zero) * scale
  // [P, H, page_size]; nullptr: scale 1, and zero 0 (of kInt4: 8)
  const float *k_scale, *v_scale, *k_zero, *v_zero;
  Strides k_scale_stride, v_scale_stride, k_zero_stride, v_zero_stride;

  uint32_t dropout_threshold;   // floor(dropout_p * 2^32), see dropout.h; 0: no dropout
  float dropout_scale;          // 1 / (1 - dropout_p)
  const int64_t* dropout_seed;  // [2]: seed and offset; nullptr: no dropout
};

}  // namespace gqa
