// The backward op that the bindings register. Its arguments are listed once for all devices.
#pragma once

#include "gradients.h"

namespace gqa::host {

// Computes the gradients of checked tensors on one device.
using Backward = Gradients(const Inputs& in, const Results& results);

Backward attention_backward_cpu, attention_backward_cuda;

// The op's arguments, in the order of its schema.
template <Backward* backward>
Gradients attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             const Tensor& head_map, const OptionalTensor& sinks,
                             const OptionalTensor& value_head_map,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& attn_mask,
                             const OptionalTensor& kv_lengths, const OptionalTensor& kv_begin,
                             const OptionalTensor& q_offsets, int64_t max_q_len, int64_t max_kv_len,
                             std::optional<double> scale, int64_t window_left, int64_t window_right,
                             double softcap, bool batch_invariant, double dropout_p,
                             const OptionalTensor& dropout_seed, const OptionalTensor& key_ranges,
                             bool need_slopes, bool need_sinks) {
  const OptionalTensor none;
  return backward({q,
                   k,
                   v,
                   head_map,
                   value_head_map,
                   alibi_slopes,
                   sinks,
                   attn_mask,
                   kv_lengths,
                   none,
                   kv_begin,
                   q_offsets,
                   max_q_len,
                   max_kv_len,
                   none,
                   none,
                   none,
                   none,
                   scale,
                   window_left,
                   window_right,
                   softcap,
                   batch_invariant,
                   dropout_p,
                   dropout_seed,
                   key_ranges},
                  {dout, dlse, out, lse, need_slopes, need_sinks});
}

}  // namespace gqa::host
