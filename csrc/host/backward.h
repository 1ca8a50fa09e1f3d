// Tensors to BackwardParams: the entry points that the bindings register.
#pragma once

#include "gradients.h"

namespace gqa::host {

Gradients attention_backward_cpu(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks);

Gradients attention_backward_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks);

Gradients packed_attention_backward_cuda(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const Tensor& kv_lengths, const Tensor& kv_begin,
    const Tensor& q_offsets, int64_t max_q_len, int64_t max_kv_len, double scale,
    int64_t window_left, int64_t window_right, double softcap, bool need_slopes, bool need_sinks);

}  // namespace gqa::host
