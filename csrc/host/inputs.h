// The arguments of the attention ops: checks, outputs, and AttentionParams. The same for every
// device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "../core/params.h"
#include "checks.h"

namespace gqa::host {

using OptionalTensor = std::optional<Tensor>;

// The tensors and options of a call, as in the ops' schemas (gqa_kernels/native/schema.py). They
// live as long as the op runs.
struct Inputs {
  const Tensor &q, &k, &v, &head_map;
  const OptionalTensor &value_head_map, &alibi_slopes, &sinks, &attn_mask, &kv_lengths;
  const OptionalTensor &page_table, &kv_begin, &q_offsets;
  int64_t max_q_len, max_kv_len;  // of packed sequences
  const OptionalTensor &k_scale, &v_scale, &k_zero, &v_zero;
  std::optional<double> scale;  // default D ** -0.5
  int64_t window_left, window_right;
  double softcap;
  bool batch_invariant;
  double dropout_p;
  const OptionalTensor& dropout_seed;  // int64 [2]: seed, offset
  const OptionalTensor& key_ranges;    // int32 [B, Hq, Sq, 2]; CPUs only
};

Strides strides_of(const Tensor& x);

// Uninitialised memory on x's device. Bypasses the dispatcher, which makes it three times as fast
// as new_empty. Torch's deterministic mode does not fill it.
Tensor empty_beside(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes,
                    std::initializer_list<int64_t> strides);

// Throws an error with name, rule and value if an argument breaks a rule of memory safety. Checks,
// in this order: dtype, device (calls `check_device` for each tensor), layout, sizes (D and Dv at
// most max_head_dim), shapes. Reads no values. K and V lie in memory as AttentionParams describes.
void check_inputs(const Inputs& in, int64_t max_head_dim,
                  void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Builds the params from the tensors' pointers, on whichever device they lie. Assumes that head
// maps, sinks, kv_begin, q_offsets and the dropout's seed are contiguous. Sets no outputs.
AttentionParams params_of(const Inputs& in);

// Allocates the outputs and enters them into the params: out [B, Hq, Sq, Dv], which lies in memory
// as [B, Sq, Hq, Dv] for bshd, and the LSE, fp32 [B, Hq, Sq].
Tensor add_output(AttentionParams& params, const Tensor& q, bool bshd);
// The same, allocated by empty_beside.
Tensor add_unfilled_output(AttentionParams& params, const Tensor& q, bool bshd);
Tensor add_lse(AttentionParams& params, const Tensor& q);

}  // namespace gqa::host
