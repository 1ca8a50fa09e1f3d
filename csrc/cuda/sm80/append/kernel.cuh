// Append: stores new tokens in a cache, rotated and quantised, and rotates queries.
//
// Grid    rows / (kAppendThreads / lanes). A row is one token of one head; heads are fastest, so
//         that the rows of a CTA share their token's length, page and angles.
// Thread  takes eight numbers of a row, which is `lanes` threads wide: loads them, turns them by
//         the token's position, finds the row's scale and zero, stores. Each byte crosses memory
//         once. Lengths and page tables are read here, so that a captured CUDA graph sees their
//         current contents. What has no slot, or a page out of range, is dropped.
// Shared  the numbers of all threads, to fetch the partners of the rotary embedding.
//
// Source: formats and rounding as gqa_kernels/cache/formats.py defines them; own code.
#pragma once

#include <cstdint>

#include "../../../core/quantize.h"
#include "../cache_slot.cuh"
#include "args.h"
#include "rotary.cuh"
#include "row_vectors.cuh"

namespace gqa::cuda::sm80 {

// The sequence of packed token `token`: the number of sequences that end at or before it. All
// threads search together for the CTA's first token, `first`; each continues from there.
__device__ __forceinline__ uint32_t packed_sequence(const int32_t* offsets, uint32_t batch,
                                                    int64_t first, int64_t token) {
  uint32_t ended = 0;  // at least; at most ended + unknown
  for (uint32_t unknown = batch; unknown > 0;) {
    const uint32_t step = (unknown + kAppendThreads - 1) / kAppendThreads;
    const uint32_t mine = (threadIdx.x + 1) * step;
    const uint32_t steps = __syncthreads_count(mine <= unknown && offsets[ended + mine] <= first);
    ended += steps * step;
    unknown = min(step - 1, unknown - steps * step);
  }
  while (ended < batch && offsets[ended + 1] <= token) ++ended;
  return ended;
}

// The range of a row whose numbers `lanes` threads hold. The whole warp calls it.
__device__ __forceinline__ RowRange range_of_row(const Numbers& x, uint32_t lanes) {
  RowRange range;
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) range.include(x[i]);
  for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
    range.low = fminf(range.low, __shfl_xor_sync(~0u, range.low, distance));
    range.high = fmaxf(range.high, __shfl_xor_sync(~0u, range.high, distance));
  }
  const uint32_t row = (lanes == 32 ? ~0u : (1u << lanes) - 1) << (threadIdx.x % 32 & -lanes);
  range.nan = (__ballot_sync(~0u, range.nan) & row) != 0;
  return range;
}

// S: how numbers are stored.
template <class S>
__device__ __forceinline__ void store_quantized(const AppendSide& side, const Slot& at,
                                                uint32_t head, int column, const RowRange& range,
                                                const Numbers& x) {
  float* to_scale = nullptr;
  float* to_zero = nullptr;
  if (side.scale != nullptr) {
    to_scale = side.scale + offset_of(side.scale_stride, at.page, head, at.slot);
  }
  if (side.zero != nullptr) {
    to_zero = side.zero + offset_of(side.zero_stride, at.page, head, at.slot);
  }
  RowScale row{1.0f, format_of<S>().default_zero};
  if (side.dynamic) {
    row = row_scale<S>(range, to_zero != nullptr);
    if (column == 0) {
      *to_scale = row.scale;
      if (to_zero != nullptr) *to_zero = row.zero;
    }
  } else {
    if (to_scale != nullptr) row.scale = *to_scale;
    if (to_zero != nullptr) row.zero = *to_zero;
  }
  constexpr int kPerByte = kNumbersPerElement<S>;
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kAppendNumbers; ++i) {
    const int bit = i * 8 / kPerByte;
    words[bit / 32] |= static_cast<uint32_t>(stored_bits<S>(quantize<S>(x[i], row))) << bit % 32;
  }
  uint8_t* to = static_cast<uint8_t*>(side.to) + offset_of(side.to_stride, at.page, head, at.slot);
  store_bytes<kPerByte>(to, column, side.dim, side.to_vectors, words);
}

template <class T>
__device__ __forceinline__ void store_plain(const AppendSide& side, const Slot& at, uint32_t head,
                                            int column, const Numbers& x) {
  T* to = static_cast<T*>(side.to) + offset_of(side.to_stride, at.page, head, at.slot);
  store_numbers(to, column, side.dim, side.to_vectors, x);
}

// T: type of the tokens. All threads take the same branch on the format of a quantised cache.
template <class T, bool kQuantized>
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ AppendArgs args) {
  const AppendParams& params = args.params;
  const AttentionParams& cache = params.cache;

  // Surplus threads read the last row and store nothing.
  const uint32_t first_row = blockIdx.x * (kAppendThreads / args.lanes);
  const uint32_t wanted = first_row + threadIdx.x / args.lanes;
  const uint32_t row = min(wanted, args.rows - 1);
  const int column = static_cast<int>(threadIdx.x % args.lanes) * kAppendNumbers;
  const uint32_t token = row / args.heads;
  uint32_t head = row % args.heads;
  const uint32_t k_heads = static_cast<uint32_t>(cache.num_k_heads);
  const uint32_t v_heads = static_cast<uint32_t>(cache.num_v_heads);
  AppendKind kind = kKeys;
  if (head >= k_heads) kind = kValues, head -= k_heads;
  if (kind == kValues && head >= v_heads) kind = kQueries, head -= v_heads;
  const AppendSide& side = args.sides[kind];

  // Token i of sequence b; in the tensors of new tokens, token `at_token` of `at_b`.
  const bool packed = params.new_offsets != nullptr;
  const uint32_t tokens = static_cast<uint32_t>(params.num_tokens);
  uint32_t b = packed ? 0 : token / tokens;
  const uint32_t at_b = b, at_token = packed ? token : token % tokens;
  Numbers x;
  load_numbers(static_cast<const T*>(side.from) + offset_of(side.from_stride, at_b, head, at_token),
               column, side.dim, side.from_vectors, x);
  int64_t i = at_token;
  if (packed) {
    const uint32_t batch = static_cast<uint32_t>(cache.batch);
    b = packed_sequence(params.new_offsets, batch, first_row / args.heads, token);
    i = b < batch ? static_cast<int64_t>(token) - params.new_offsets[b] : -1;
  }

  // Queries use the length of key head 0, and so do value heads that differ from the key heads: all
  // lengths are equal then. A token that belongs to no sequence has no position, and its queries
  // are only copied.
  const bool of_sequence = i >= 0;
  const bool paired = kind == kKeys || (kind == kValues && v_heads == k_heads);
  const uint32_t k_head = paired ? head : 0;
  int64_t position = 0;
  Slot at{at_b, at_token, true};
  if (of_sequence) {
    position =
        i + cache.kv_lengths[b * cache.kv_lengths_stride_b + k_head * cache.kv_lengths_stride_h];
  }
  if (kind != kQueries) at = of_sequence ? slot_of(cache, b, k_head, position) : Slot{0, 0, false};

  if (params.rotary_cos != nullptr) {
    rotate<T>(args, position, column, side.turned && of_sequence, x);
  }
  RowRange range;
  if (kQuantized) range = range_of_row(x, args.lanes);
  if (wanted >= args.rows || !at.valid || column >= static_cast<int>(side.dim)) return;
  if (!kQuantized || kind == kQueries) return store_plain<T>(side, at, head, column, x);
  switch (cache.k_dtype) {
    case DType::kFloat8E4M3: return store_quantized<Float8E4M3>(side, at, head, column, range, x);
    case DType::kFloat8E5M2: return store_quantized<Float8E5M2>(side, at, head, column, range, x);
    case DType::kInt8: return store_quantized<Int8>(side, at, head, column, range, x);
    default: return store_quantized<Int4Pair>(side, at, head, column, range, x);
  }
}

}  // namespace gqa::cuda::sm80
