// The op that keeps some keys of a cache and drops the rest. Its arguments are listed once for all
// devices.
#pragma once

#include "keep_inputs.h"

namespace gqa::host {

// Moves the rows of k, v and of scales and zeros per row: key indices[b, h, i] becomes key i, for i
// < counts[b, h]. indices: int32 [B, Hk, n], ascending in [0, kv_lengths[b, h]). counts: int32 [B,
// Hk].
using Keep = void(const KeepInputs& in);

Keep cache_keep_cpu, cache_keep_cuda;

// The op's arguments, in the order of its schema.
template <Keep* keep>
void cache_keep(const Tensor& indices, const Tensor& counts, Tensor k, Tensor v,
                const Tensor& kv_lengths, const OptionalTensor& page_table,
                const OptionalTensor& kv_begin, OptionalTensor k_scale, OptionalTensor v_scale,
                OptionalTensor k_zero, OptionalTensor v_zero) {
  keep({indices, counts, k, v, kv_lengths, page_table, kv_begin, k_scale, v_scale, k_zero, v_zero});
}

}  // namespace gqa::host
