// Where the row of a key is stored, for kernels that write caches.
#pragma once

#include <cstdint>

#include "../../core/params.h"

namespace gqa::cuda::sm80 {

// Where a row is stored; not `valid` if it has no place.
struct Slot {
  int64_t page, slot;
  bool valid;
};

__device__ __forceinline__ Slot slot_of(const AttentionParams& cache, uint32_t b, uint32_t k_head,
                                        int64_t position) {
  const int64_t slot = position + (cache.kv_begin == nullptr ? 0 : cache.kv_begin[b]);
  if (position < 0 || slot < 0 || slot >= cache.kv_len) return {0, 0, false};
  if (cache.page_table == nullptr) return {b, slot, true};
  const uint32_t page_size = static_cast<uint32_t>(cache.page_size);
  const uint32_t entry = static_cast<uint32_t>(slot) / page_size;
  const int32_t page =
      cache.page_table[b * cache.page_table_stride_b + k_head * cache.page_table_stride_h +
                       entry * cache.page_table_stride_p];
  return {page, static_cast<uint32_t>(slot) % page_size, page >= 0 && page < cache.num_pages};
}

// Of row (first, head, second) in a tensor of rows.
__device__ __forceinline__ int64_t offset_of(const Strides& stride, int64_t first, int64_t head,
                                             int64_t second) {
  return first * stride.b + head * stride.h + second * stride.s;
}

}  // namespace gqa::cuda::sm80
