// Finds the part of a sequence's keys that a CTA processes.
//
// Without lengths every sequence is cut into the same number of parts. With lengths, which only the
// device knows, all sequences are cut into parts of about equally many blocks, so that one long
// sequence among short ones doesn't keep the device waiting. Every CTA adds up the lengths and finds
// its part itself: no launch comes before, and the grid follows from shapes alone.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/scan.cuh"
#include "config.h"
#include "part_rule.h"

namespace gqa::cuda::sm80 {

struct DecodePart {
  int b;       // sequence; -1: there is no such part
  int split;   // among the sequence's
  int splits;  // of the sequence
  int number;  // among all parts: where partial results are
};

struct PartSearch {
  int warp_sums[kDecodeWarps];
  int64_t warp_blocks[kDecodeWarps];
  DecodePart part;
};

// Blocks of keys of a sequence, by its longest KV head.
__device__ __forceinline__ int blocks_of(const DecodeParams& p, int b) {
  const AttentionParams& a = p.attention;
  const int heads = a.kv_lengths_stride_h == 0 ? 1 : static_cast<int>(a.num_k_heads);
  int64_t longest = 0;
  for (int h = 0; h < heads; ++h) longest = max(longest, kv_length(a, b, h));
  return static_cast<int>((min(longest, p.most_keys) + kDecodeBlock - 1) / kDecodeBlock);
}

// Part `number` of all sequences, cut by their lengths. By all threads of the CTA.
__device__ __forceinline__ DecodePart find_part(const DecodeParams& p, int number,
                                                PartSearch& search) {
  const int thread = threadIdx.x, batch = static_cast<int>(p.attention.batch);
  int64_t blocks = 0;
  for (int b = thread; b < batch; b += kDecodeThreads) blocks += blocks_of(p, b);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) blocks += __shfl_xor_sync(~0u, blocks, d);
  if (thread % 32 == 0) search.warp_blocks[thread / 32] = blocks;
  if (thread == 0) search.part = {-1, 0, 0, 0};
  __syncthreads();  // warp_blocks
  blocks = 0;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) blocks += search.warp_blocks[w];
  const int64_t of_part = blocks_per_part(blocks, p.even_parts);

  int earlier = 0;  // parts of earlier passes
  for (int pass = 0; pass < batch; pass += kDecodeThreads) {
    const int b = pass + thread;
    const int splits = b < batch ? static_cast<int>(parts_of(blocks_of(p, b), of_part)) : 0;
    int total;
    const int end = earlier + scan_threads<kDecodeThreads>(splits, search.warp_sums, total);
    if (number < end && number >= end - splits) {
      search.part = {b, number - (end - splits), splits, number};
    }
    earlier += total;
    __syncthreads();  // the part, if it was found; warp_sums are read
    if (search.part.b >= 0) break;
  }
  return search.part;
}

}  // namespace gqa::cuda::sm80
