// The arguments of the forward ops: checks, outputs, and AttentionParams. The same for every
// device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../core/params.h"
#include "checks.h"

namespace gqa::host {

using OptionalTensor = std::optional<Tensor>;

// Arguments of attention_forward; tensors live as long as the op runs.
struct Inputs {
  const Tensor &q, &k, &v, &head_map;
  const OptionalTensor &value_head_map, &alibi_slopes, &sinks, &attn_mask, &kv_lengths;
  double scale;
  int64_t window_left, window_right;
  double softcap;
  bool bshd;
};

// What cache_attention_forward has beyond them.
struct CacheInputs {
  const OptionalTensor &page_table, &kv_begin, &q_offsets;
  int64_t max_q_len;
  const OptionalTensor &k_scale, &v_scale, &k_zero, &v_zero;
};

struct Outputs {
  Tensor out;  // [B, Hq, Sq, Dv]; where bshd, a view of [B, Sq, Hq, Dv]
  Tensor lse;  // fp32 [B, Hq, Sq]
};

DType dtype_of(const char* name, const Tensor& x);

// Throw with name, rule and value where the arguments break a rule that memory safety needs: dtype,
// device (that of q, for which `check_device` is called too), layout, sizes, shapes, in this order.
// With `cache`, K and V lie as AttentionParams describes; without, they are [B, H, Sk, D].
void check_inputs(const Inputs& in, const CacheInputs* cache,
                  void (*check_device)(const char* name, const Tensor& x, const Tensor& q));

Outputs empty_outputs(const Inputs& in);

// Every pointer is that of the tensor, on whatever device it lies; head maps and sinks are taken to
// be contiguous.
AttentionParams params_of(const Inputs& in, const CacheInputs* cache, Outputs& outputs);

}  // namespace gqa::host
