// Tiles of Q, K and V from global to shared memory by cp.async, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "../../common/copy_rows.cuh"
#include "../../common/ptx.cuh"
#include "config.h"
#include "tile.cuh"

namespace gqa::cuda::sm80 {

// What one thread copies: 16-byte chunk `chunk` of rows row, row + kCopyRows, ... of a tile.
template <class C>
struct CopyPlace {
  int row, chunk;
  uint32_t offset;  // of the chunk of the first row in the tile's shared memory

  __device__ __forceinline__ CopyPlace() {
    chunk = threadIdx.x % C::kChunks;
    row = threadIdx.x / C::kChunks;
    offset = row * C::kRowBytes + ((chunk ^ (row & 7)) << 4);  // rows are copied 8 n apart
  }
};

// Eight elements that no 16-byte load can take: unaligned, or the row ends among them.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* row, int column, int dim) {
  uint32_t x[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < dim) x[i / 2] |= static_cast<uint32_t>(row[column + i].bits) << (i % 2 * 16);
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

// Copies one row's chunk, or zeros where `row` is nullptr or the chunk lies beyond `dim`.
// `elements`: 16-byte copies are ruled out; the copy is then done when the function returns.
template <class T>
__device__ __forceinline__ void copy_chunk(uint32_t to, const T* row, int column, int dim,
                                           bool elements) {
  if (elements) {
    st_shared_v4(to, row == nullptr ? make_uint4(0, 0, 0, 0) : load_elements(row, column, dim));
  } else {
    cp_async16(to, row + column, row != nullptr && column < dim);
  }
}

// Starts the copy of keys first_key and on of K or V to a slot. Rows beyond the sequence's keys
// become zeros: their scores are masked, but a NaN times a probability of 0 would not be.
// kKeys: rows of K, whose pages outside the storage poison the scores.
template <class C, bool kKeys, bool kGeneral, class T>
__device__ __forceinline__ void load_tile(const PrefillArgs& args, const CopyRows<T>& rows,
                                          int first_key, int length, uint32_t slot) {
  constexpr int kRows = C::kCopyRows, kCopies = C::kBlockN / kRows;
  const AttentionParams& params = args.params;
  const int64_t stride = kKeys ? params.k_stride.s : params.v_stride.s;
  const int dim = static_cast<int>(kKeys ? params.head_dim : params.value_head_dim);
  const bool elements = kGeneral && args.elements;
  const CopyPlace<C> place;
  const int key = first_key + place.row;
  const uint32_t to = slot + place.offset;
  if (elements || params.page_table != nullptr) {
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
  const T* at = rows.base + place.chunk * 8 + static_cast<uint32_t>(key) * stride;
  const bool in_dim = place.chunk * 8 < dim;
  if (first_key + C::kBlockN <= length) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(to + i * kRows * C::kRowBytes, at + i * kRows * stride, in_dim);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async16(to + i * kRows * C::kRowBytes, at + i * kRows * stride,
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
__device__ __forceinline__ void load_q(const PrefillArgs& args, const PrefillTile& tile,
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
