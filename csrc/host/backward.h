// Tensors to BackwardParams: the entry point that bindings.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "call.h"

namespace gqa::host {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
attention_backward_cpu(const torch::stable::Tensor& dout, const OptionalTensor& dlse,
                       const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                       const torch::stable::Tensor& v, const torch::stable::Tensor& out,
                       const torch::stable::Tensor& lse, const torch::stable::Tensor& head_map,
                       const OptionalTensor& value_head_map, const OptionalTensor& alibi_slopes,
                       const OptionalTensor& sinks, const OptionalTensor& attn_mask,
                       const OptionalTensor& kv_lengths, double scale, int64_t window_left,
                       int64_t window_right, double softcap, double dropout_p,
                       const OptionalTensor& dropout_seed, bool need_slopes, bool need_sinks);

}  // namespace gqa::host
