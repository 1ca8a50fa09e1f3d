// Entry points that bindings.cpp and bindings_cuda.cpp register.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "inputs.h"

namespace gqa::host {

// k, v and, where they hold one number for each row, the scales and zeros are written.
using CacheAppend = torch::stable::Tensor(
    const OptionalTensor& q, const torch::stable::Tensor& k_new, const torch::stable::Tensor& v_new,
    torch::stable::Tensor k, torch::stable::Tensor v, const torch::stable::Tensor& kv_lengths,
    const OptionalTensor& page_table, const OptionalTensor& kv_begin,
    const OptionalTensor& new_offsets, OptionalTensor k_scale, OptionalTensor v_scale,
    OptionalTensor k_zero, OptionalTensor v_zero, const OptionalTensor& rotary_cos,
    const OptionalTensor& rotary_sin, bool rotary_interleaved);

CacheAppend cache_append_cpu, cache_append_cuda;

}  // namespace gqa::host
