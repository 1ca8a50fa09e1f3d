// The forward op that the bindings register: its arguments, once for all devices.
#pragma once

#include <tuple>

#include "inputs.h"

namespace gqa::host {

// Attention of checked tensors on one device. bshd: out's memory is [B, Sq, Hq, Dv]. lse_wanted:
// false if the LSE won't be read; then it is empty.
using Forward = std::tuple<Tensor, Tensor>(const Inputs& in, bool bshd, bool lse_wanted);

Forward attention_forward_cpu, attention_forward_cuda;

// The op's arguments, in the order of its schema.
template <Forward* forward>
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, int64_t max_kv_len,
    const OptionalTensor& k_scale, const OptionalTensor& v_scale, const OptionalTensor& k_zero,
    const OptionalTensor& v_zero, std::optional<double> scale, int64_t window_left,
    int64_t window_right, double softcap, double dropout_p, const OptionalTensor& dropout_seed,
    bool bshd, bool lse_wanted) {
  return forward(
      {q,         k,          v,           head_map, value_head_map, alibi_slopes, sinks,
       attn_mask, kv_lengths, page_table,  kv_begin, q_offsets,      max_q_len,    max_kv_len,
       k_scale,   v_scale,    k_zero,      v_zero,   scale,          window_left,  window_right,
       softcap,   dropout_p,  dropout_seed},
      bshd, lse_wanted);
}

}  // namespace gqa::host
