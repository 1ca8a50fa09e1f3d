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

// Tensors and options of a call, as the ops' schemas have them (gqa_kernels/native/schema.py); they
// live as long as the op runs.
struct Inputs {
  const Tensor &q, &k, &v, &head_map;
  const OptionalTensor &value_head_map, &alibi_slopes, &sinks, &attn_mask, &kv_lengths;
  const OptionalTensor &page_table, &kv_begin, &q_offsets;
  int64_t max_q_len, max_kv_len;  // of packed sequences
  const OptionalTensor &k_scale, &v_scale, &k_zero, &v_zero;
  std::optional<double> scale;  // D ** -0.5 without
  int64_t window_left, window_right;
  double softcap;
  bool batch_invariant;
  double dropout_p;
  const OptionalTensor& dropout_seed;  // int64 [2]: seed, offset
  const OptionalTensor& key_ranges;    // int32 [B, Hq, Sq, 2]; CPUs only
};

Strides strides_of(const Tensor& x);

// Uninitialised memory on x's device. Past the dispatcher, and so three times as fast as new_empty;
// torch's deterministic mode does not fill it.
Tensor empty_beside(const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> sizes,
                    std::initializer_list<int64_t> strides);

// Throw with name, rule and value where the arguments break a rule that memory safety needs: dtype,
// device (for each tensor `check_device` is called), layout, sizes (D and Dv at most max_head_dim),
// shapes, in this order. Values are not looked at. K and V lie as AttentionParams describes.
void check_inputs(const Inputs& in, int64_t max_head_dim,
                  void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

// Every pointer is that of the tensor, on whatever device it lies; head maps, sinks, kv_begin,
// q_offsets and the dropout's seed are taken to be contiguous. Without outputs.
AttentionParams params_of(const Inputs& in);

// Outputs in memory of their own, entered into the params of the call: out [B, Hq, Sq, Dv], in
// memory [B, Sq, Hq, Dv] for bshd, and the LSE, fp32 [B, Hq, Sq].
Tensor add_output(AttentionParams& params, const Tensor& q, bool bshd);
// The same from empty_beside.
Tensor add_unfilled_output(AttentionParams& params, const Tensor& q, bool bshd);
Tensor add_lse(AttentionParams& params, const Tensor& q);

}  // namespace gqa::host
