// Tiles of Q, K and V from global to shared memory by cp.async, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"
#include "warp_pages.cuh"

namespace gqa::cuda::sm80 {

// Starts the copy of keys first_key and on of K or V to a slot. Rows beyond the sequence's keys
// become zeros: their scores are masked, but a NaN times a probability of 0 would not be.
// kKeys: rows of K, whose pages outside the storage poison the scores.
template <class C, bool kKeys, bool kGeneral, bool kPaged, class T>
__device__ __forceinline__ void load_tile(const PrefillArgs& args, const RowOrigin<T>& origin,
                                          const WarpPages<C>& pages, int first_key, int length,
                                          uint32_t slot) {
  constexpr int kRows = C::kCopyRows, kCopies = C::kBlockN / kRows;
  const AttentionParams& params = args.params;
  const Strides& strides = kKeys ? params.k_stride : params.v_stride;
  const int dim = static_cast<int>(kKeys ? params.head_dim : params.value_head_dim);
  const bool elements = kGeneral && args.elements;
  const CopyPlace<C> place(current_thread());
  const int key = first_key + place.row;
  const uint32_t to = slot + place.offset;
  const bool in_dim = place.chunk * 8 < dim;
  if constexpr (kPaged) {
    if (!elements && pages.template copy<kKeys>(origin.base, to, in_dim)) return;
  }
  if (kPaged || elements) {
    CopyRows<T> rows = copy_rows(params, args.by_page_size, strides, origin);
    if (!kPaged) rows.table = nullptr;  // for the compiler
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const T* row = nullptr;
      if (key + i * kRows < length) {
        row = kKeys ? rows.key_row(key + i * kRows) : rows.row(key + i * kRows);
      }
      copy_chunk(to + i * kRows * C::kRowBytes, row, place.chunk * 8, dim, elements);
    }
    return;
  }
  const T* at = origin.base + place.chunk * 8 + static_cast<uint32_t>(key) * strides.s;
  if (first_key + C::kBlockN <= length) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(to + i * kRows * C::kRowBytes, at + i * kRows * strides.s, in_dim);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(to + i * kRows * C::kRowBytes, at + i * kRows * strides.s,
                 in_dim && key + i * kRows < length);
    }
  }
}

// The ring's slot after and before one.
template <class C>
__device__ __forceinline__ uint32_t slot_after(uint32_t slot, uint32_t ring) {
  return slot == ring + (C::kSlots - 1) * C::kSlotBytes ? ring : slot + C::kSlotBytes;
}
template <class C>
__device__ __forceinline__ uint32_t slot_before(uint32_t slot, uint32_t ring) {
  return slot == ring ? ring + (C::kSlots - 1) * C::kSlotBytes : slot - C::kSlotBytes;
}

// Q's rows of the tile; those beyond the sequence's tokens become zeros.
template <class T, class C, bool kGeneral>
__device__ __forceinline__ void load_q(const PrefillArgs& args, const QueryTile& tile,
                                       uint32_t to) {
  const AttentionParams& params = args.params;
  const CopyPlace<C> place;
  const T* first = static_cast<const T*>(params.q) + tile.q_batch * params.q_stride.b +
                   tile.head * params.q_stride.h +
                   (tile.first_token + tile.token) * params.q_stride.s;
#pragma unroll 4
  for (int i = 0; i < C::kBlockM / C::kCopyRows; ++i) {
    const int row = place.row + i * C::kCopyRows;
    copy_chunk(to + place.offset + i * C::kCopyRows * C::kRowBytes,
               tile.token + row < tile.q_len ? first + row * params.q_stride.s : nullptr,
               place.chunk * 8, static_cast<int>(params.head_dim), kGeneral && args.elements);
  }
}

}  // namespace gqa::cuda::sm80
