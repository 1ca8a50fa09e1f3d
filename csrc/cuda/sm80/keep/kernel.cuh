// Keep: moves the rows of the kept keys of a cache to the front of their sequence.
//
// Grid    x: sequences times heads, those of K before those of V. y: pieces of kKeepBytes of a row.
//         Rows move by their bytes, whatever the format, so each piece moves by itself: a few long
//         sequences fill the device.
// CTA     moves its piece of rows in the order of the keys, `kLanes` times kKeepRows of them in a
//         step: key indices[i] becomes key i. Indices ascend, so the rows that a step reads lie at
//         or behind those that it writes, and behind those that earlier steps wrote. Hence one
//         barrier in a step, between its loads and its stores.
// Thread  moves one Piece of kKeepRows rows, and, at the start of a row, its scale and zero.
//
// Lengths, counts and page tables are read here, so that a captured CUDA graph sees their current
// contents.
#pragma once

#include <cstdint>

#include "../../../core/keep_params.h"
#include "../../common/ptx.cuh"
#include "../cache_slot.cuh"

namespace gqa::cuda::sm80 {

constexpr int kKeepThreads = 128;
constexpr int kKeepBytes = 64;  // of a row, in one CTA: two sectors
constexpr int kKeepRows = 4;    // rows in flight for each thread

__device__ __forceinline__ uint4 load_piece(const uint4* from) { return ld_global_v4(from); }
__device__ __forceinline__ uint8_t load_piece(const uint8_t* from) { return *from; }
__device__ __forceinline__ void store_piece(uint4* to, uint4 x) { st_global_v4(to, x); }
__device__ __forceinline__ void store_piece(uint8_t* to, uint8_t x) { *to = x; }

// Piece: uint4 if all rows are aligned to it, else uint8_t.
template <class Piece>
__global__ void __launch_bounds__(kKeepThreads)
    keep_kernel(const __grid_constant__ KeepParams params) {
  constexpr uint32_t kPieces = kKeepBytes / sizeof(Piece);
  constexpr uint32_t kLanes = kKeepThreads / kPieces;  // rows side by side
  const AttentionParams& cache = params.cache;

  const uint32_t k_heads = static_cast<uint32_t>(cache.num_k_heads);
  const uint32_t v_heads = static_cast<uint32_t>(cache.num_v_heads);
  const uint32_t b = blockIdx.x / (k_heads + v_heads);
  uint32_t head = blockIdx.x % (k_heads + v_heads);
  const bool is_key = head < k_heads;
  if (!is_key) head -= k_heads;
  const KeptSide& side = is_key ? params.k : params.v;
  if (blockIdx.y * kKeepBytes >= side.row_bytes) return;  // the other side has longer rows
  const Strides& stride = is_key ? cache.k_stride : cache.v_stride;
  const Strides& scale_stride = is_key ? cache.k_scale_stride : cache.v_scale_stride;
  const Strides& zero_stride = is_key ? cache.k_zero_stride : cache.v_zero_stride;

  // If value heads differ from key heads, all share one table row, length and list of indices.
  const uint32_t k_head = is_key || v_heads == k_heads ? head : 0;
  const int64_t begin = cache.kv_begin == nullptr ? 0 : cache.kv_begin[b];
  const int64_t length =
      min(static_cast<int64_t>(
              cache.kv_lengths[b * cache.kv_lengths_stride_b + k_head * cache.kv_lengths_stride_h]),
          cache.kv_len - begin);
  const int64_t count =
      min(min(static_cast<int64_t>(
                  params.counts[b * params.count_stride_b + k_head * params.count_stride_h]),
              params.num_indices),
          length);
  const int32_t* index =
      params.indices + b * params.index_stride_b + k_head * params.index_stride_h;

  const int64_t byte = blockIdx.y * kKeepBytes + threadIdx.x % kPieces * sizeof(Piece);
  const uint32_t lane = threadIdx.x / kPieces;
  const bool in_row = byte < side.row_bytes;
  const auto piece_of = [&](const Slot& at) {
    const int64_t row = offset_of(stride, at.page, head, at.slot) * side.element_bytes;
    return reinterpret_cast<Piece*>(static_cast<char*>(side.data) + row + byte);
  };
  const bool moves_scale = byte == 0 && side.scale != nullptr;
  const bool moves_zero = byte == 0 && side.zero != nullptr;

  for (int64_t first = 0; first < count; first += kLanes * kKeepRows) {
    Slot to[kKeepRows];
    Piece pieces[kKeepRows];
    float scales[kKeepRows], zeros[kKeepRows];
#pragma unroll
    for (int r = 0; r < kKeepRows; ++r) {
      const int64_t i = first + r * kLanes + lane;
      to[r] = Slot{0, 0, false};
      if (i >= count || !in_row) continue;
      const int64_t key = index[i * params.index_stride_n];
      if (key == i || key < 0 || key >= length) continue;
      const Slot from = slot_of(cache, b, k_head, key);
      to[r] = slot_of(cache, b, k_head, i);
      to[r].valid = to[r].valid && from.valid;
      if (!to[r].valid) continue;
      pieces[r] = load_piece(piece_of(from));
      if (moves_scale) scales[r] = side.scale[offset_of(scale_stride, from.page, head, from.slot)];
      if (moves_zero) zeros[r] = side.zero[offset_of(zero_stride, from.page, head, from.slot)];
    }
    __syncthreads();  // other warps may still read the rows that this one overwrites
#pragma unroll
    for (int r = 0; r < kKeepRows; ++r) {
      if (!to[r].valid) continue;
      store_piece(piece_of(to[r]), pieces[r]);
      if (moves_scale) {
        side.scale[offset_of(scale_stride, to[r].page, head, to[r].slot)] = scales[r];
      }
      if (moves_zero) {
        side.zero[offset_of(zero_stride, to[r].page, head, to[r].slot)] = zeros[r];
      }
    }
  }
}

}  // namespace gqa::cuda::sm80
