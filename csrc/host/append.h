// The append op that the bindings register. Its arguments are listed once for all devices.
#pragma once

#include "append_inputs.h"

namespace gqa::host {

// Writes k and v and, if each row has its own, the scales and zeros. Returns the rotated q.
using Append = Tensor(const AppendInputs& in);

Append cache_append_cpu, cache_append_cuda;

// The op's arguments, in the order of its schema.
template <Append* append>
Tensor cache_append(const Tensor& k_new, const Tensor& v_new, Tensor k, Tensor v,
                    const Tensor& kv_lengths, int64_t max_new, const OptionalTensor& page_table,
                    const OptionalTensor& kv_begin, const OptionalTensor& new_offsets,
                    OptionalTensor k_scale, OptionalTensor v_scale, OptionalTensor k_zero,
                    OptionalTensor v_zero, const OptionalTensor& q,
                    const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                    bool rotary_interleaved) {
  return append({q, k_new, v_new, k, v, kv_lengths, page_table, kv_begin, new_offsets, max_new,
                 k_scale, v_scale, k_zero, v_zero, rotary_cos, rotary_sin, rotary_interleaved});
}

}  // namespace gqa::host
