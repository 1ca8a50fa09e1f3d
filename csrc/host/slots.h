// Checks the values of a cache's lengths and page table, if they are in the host's memory.
#pragma once

#include "inputs.h"

namespace gqa::host {

// Whether keys [0, kv_lengths + new) of every (sequence, key head) have slots. That requires
// non-negative lengths and begins, an end within max_pages * page_size (page_size without a table),
// and page ids in [0, num_pages). kv_lengths [B, Hk], page_table [B, Hk, max_pages] and kv_begin
// [B] are int32. Sequence b has new_offsets[b + 1] - new_offsets[b] new tokens if new_offsets [B +
// 1] is passed, else new_tokens.
bool cache_slots_exist_cpu(const Tensor& kv_lengths, const OptionalTensor& page_table,
                           const OptionalTensor& kv_begin, const OptionalTensor& new_offsets,
                           int64_t new_tokens, int64_t num_pages, int64_t page_size);

}  // namespace gqa::host
