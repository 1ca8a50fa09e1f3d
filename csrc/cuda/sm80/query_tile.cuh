// Which block of query tokens, of one head of one sequence, a CTA computes results for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "../common/group_rows.cuh"

namespace gqa::cuda::sm80 {

// K and V of a section of tiles: about half of the L2 of an A100 (40 MB), whose halves each keep
// their own copy of what both read.
constexpr int64_t kSectionBytes = 20 << 20;

// Pairs of a sequence and a query head that CTAs take as one section.
inline int section_pairs(const AttentionParams& params) {
  // The host does not know the groups' shapes; on average so many query heads share a KV head.
  const int64_t heads = std::max<int64_t>(1, params.num_heads / params.num_k_heads);
  const int64_t bits = is_quantized(params.k_dtype) ? params.k_dtype == DType::kInt4 ? 4 : 8 : 16;
  const int64_t bytes = params.kv_len * (params.head_dim + params.value_head_dim) * bits / 8;
  const int64_t groups = std::max<int64_t>(1, kSectionBytes / std::max<int64_t>(1, bytes));
  return static_cast<int>(std::min(params.batch * params.num_heads, groups * heads));
}

struct QueryTile {
  int b, head, k_head, v_head;
  bool valid;                    // whether both map entries are in range
  int64_t q_batch, first_token;  // of the sequence's tokens in q, out and LSE
  int q_len;                     // query tokens of the sequence
  int token;                     // first one of the tile
  int length;                    // keys of the sequence
};

// Query head number `place` where those that read the same K and V come one after another. By the
// whole CTA; `scratch` is Hq + 1 ints of shared memory. Read from the map itself: no plan has to be
// made before, and a map that changes between graph replays is simply read again.
template <int kThreads>
__device__ __forceinline__ int head_at(const AttentionParams& params, int place, int* scratch) {
  const int heads = static_cast<int>(params.num_heads);
  int *found = scratch, *keys = scratch + 1;
  for (int h = threadIdx.x; h < heads; h += kThreads) keys[h] = group_key(params, h);
  __syncthreads();  // keys
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    const int key = keys[h];
    int before = 0;
    for (int o = 0; o < heads; ++o) before += keys[o] < key || (keys[o] == key && o < h);
    if (before == place) *found = h;
  }
  __syncthreads();  // found
  const int head = *found;
  __syncthreads();  // scratch may be written again
  return head;
}

// CTAs start in the order of blockIdx.x: sections of (sequence, head) pairs whose K and V fit in L2
// together; within one the blocks of tokens from the last, whose causal rows are longest, to the
// first; sequences; heads. So heads of a group run at the same time and find each other's K and V
// in L2, and so do the blocks of tokens of a section.
template <class C>
__device__ __forceinline__ QueryTile find_query_tile(const AttentionParams& params,
                                                     uint32_t section_pairs, int* scratch) {
  const uint32_t heads = params.num_heads, pairs = heads * static_cast<uint32_t>(params.batch);
  const uint32_t q_tiles = (static_cast<uint32_t>(params.q_len) + C::kBlockM - 1) / C::kBlockM;
  const uint32_t first_pair = blockIdx.x / (q_tiles * section_pairs) * section_pairs;
  const uint32_t width = min(section_pairs, pairs - first_pair);
  const uint32_t rest = blockIdx.x - q_tiles * first_pair;
  const uint32_t pair = first_pair + rest % width;

  QueryTile tile;
  tile.b = pair / heads;
  tile.token = (q_tiles - 1 - rest / width) * C::kBlockM;
  tile.head = head_at<C::kThreads>(params, pair % heads, scratch);
  tile.k_head = params.head_map[tile.head];
  tile.v_head = params.value_head_map == nullptr ? tile.k_head : params.value_head_map[tile.head];
  tile.valid = static_cast<uint32_t>(tile.k_head) < static_cast<uint32_t>(params.num_k_heads) &&
               static_cast<uint32_t>(tile.v_head) < static_cast<uint32_t>(params.num_v_heads);
  const Queries queries = queries_of(params, tile.b);
  tile.q_batch = queries.b;
  tile.first_token = queries.first;
  tile.q_len = static_cast<int>(queries.count);
  tile.length = tile.valid ? static_cast<int>(kv_length(params, tile.b, tile.k_head)) : 0;
  return tile;
}

}  // namespace gqa::cuda::sm80
