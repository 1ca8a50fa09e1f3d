// The op that keeps some keys of a cache and drops the rest: its arguments.
#pragma once

#include "inputs.h"

namespace gqa::host {

// Moves the rows of k, v and of scales and zeros per row: key indices[b, h, i] becomes key i, for i
// < counts[b, h]. indices: int32 [B, Hk, n], ascending in [0, kv_lengths[b, h]). counts: int32 [B,
// Hk].
void cache_keep_cpu(const Tensor& indices, const Tensor& counts, Tensor k, Tensor v,
                    const Tensor& kv_lengths, const OptionalTensor& page_table,
                    const OptionalTensor& kv_begin, OptionalTensor k_scale, OptionalTensor v_scale,
                    OptionalTensor k_zero, OptionalTensor v_zero);

}  // namespace gqa::host
