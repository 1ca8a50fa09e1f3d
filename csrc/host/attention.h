// Tensors to AttentionParams: the entry points that bindings.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "call.h"

namespace gqa::host {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_forward_cpu(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& head_map, const OptionalTensor& value_head_map,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& attn_mask, const OptionalTensor& kv_lengths, double scale,
    int64_t window_left, int64_t window_right, double softcap, bool bshd, double dropout_p,
    const OptionalTensor& dropout_seed);

// max_q_len sizes the grids of accelerators; here q_offsets says it.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> cache_attention_forward_cpu(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& head_map, const OptionalTensor& value_head_map,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& attn_mask, const torch::stable::Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& q_offsets, int64_t max_q_len, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    double scale, int64_t window_left, int64_t window_right, double softcap, bool bshd);

}  // namespace gqa::host
