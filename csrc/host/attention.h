// Tensors to AttentionParams: the entry points of the forward ops that bindings.cpp registers.
#pragma once

#include <tuple>

#include "inputs.h"

namespace gqa::host {

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed);

// A plain call in as few arguments as can be: converting one costs about as much as checking it.
// num_kv_heads: of K and of V. Without a scale, D ** -0.5. The LSE is not kept.
Tensor plain_attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& head_map, int64_t num_kv_heads,
                                   std::optional<double> scale, bool causal, bool bshd);

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    double dropout_p, const OptionalTensor& dropout_seed);

// On the CPU max_q_len is not needed: q_offsets says it. On CUDA devices lse_wanted is not.
std::tuple<Tensor, Tensor> cache_attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    bool lse_wanted);

std::tuple<Tensor, Tensor> cache_attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& head_map,
    const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& attn_mask, const Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd,
    bool lse_wanted);

}  // namespace gqa::host
