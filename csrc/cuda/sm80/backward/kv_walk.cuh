// The keys that a CTA of the kernel for dK and dV owns, and the query tokens that it visits.
#pragma once

#include <cstdint>

#include "../../../core/visible.h"
#include "../../common/group_rows.cuh"
#include "args.h"
#include "config.h"

namespace gqa::cuda::sm80 {

struct KvTile {
  int group;  // the key or value head
  int b, first_key;
  int first_slot;  // in k and v, of the sequence's first key
  int end_key;     // of the rows of dK and dV that are the sequence's
  int q_len;       // query tokens of the sequence
  // Those of its first token: the row in q and dO, and the numbers.
  int64_t q_batch, first_token, first_numbers;
};

// A block of tokens of one head of the group. head -1: the walk is over.
struct KvStep {
  int head, k_head, v_head;
  int length;       // keys of (b, key head)
  int token, stop;  // first token of the block; the end of the head's tokens that see a key
  int low, high;    // tokens [low, high) see the tile's first key; a key further on: as much later
  bool first;       // of this head
};

// Whether the block's tokens see any, and all, of `count` keys, `offset` on from the tile's first.
// Tokens past the end count as others do.
struct Visibility {
  bool any, all;
};

template <class C>
__device__ __forceinline__ Visibility visibility(const KvTile& tile, const KvStep& step, int offset,
                                                 int count) {
  const int low = step.low + offset, high = step.high + offset, last = count - 1;
  const int first_key = tile.first_key + offset, last_token = step.token + C::kBlockN - 1;
  return {last_token >= low && step.token < high + last && first_key < step.length,
          step.token >= low + last && last_token < high && first_key + last < step.length};
}

// The key or value head that query head `head` belongs to; -1 if a map entry is out of range.
__device__ __forceinline__ int group_of(const BackwardArgs& args, int head) {
  const int key = group_key(args.params.call, head);
  const int num_v = static_cast<int>(args.params.call.num_v_heads);
  return key < 0 ? -1 : args.by_value ? key % num_v : key / num_v;
}

// The group number `place` where the largest come first. By the whole CTA; `scratch` is an int for
// each group and one more, of shared memory. (Counting by atomics: integers add up the same in any
// order.)
template <int kThreads>
__device__ __forceinline__ int group_at(const BackwardArgs& args, int num_groups, int place,
                                        int* scratch) {
  const int heads = static_cast<int>(args.params.call.num_heads);
  int *found = scratch, *sizes = scratch + 1;
  for (int g = threadIdx.x; g < num_groups; g += kThreads) sizes[g] = 0;
  __syncthreads();  // zeros
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    const int group = group_of(args, h);
    if (group >= 0) atomicAdd(&sizes[group], 1);
  }
  __syncthreads();  // sizes
  for (int g = threadIdx.x; g < num_groups; g += kThreads) {
    const int size = sizes[g];
    int before = 0;
    for (int o = 0; o < num_groups; ++o) before += sizes[o] > size || (sizes[o] == size && o < g);
    if (before == place) *found = g;
  }
  __syncthreads();  // found
  const int group = *found;
  __syncthreads();  // scratch may be written again
  return group;
}

// CTAs start in the order of blockIdx.x: groups, the largest first; sequences; blocks of keys from
// the first, which most tokens see in causal order. So the longest work starts first, and the
// blocks of a group, which run at the same time, find its Q and dO in L2. `members`: gets a bit for
// each query head of the group; valid after a barrier.
template <class C>
__device__ __forceinline__ KvTile find_kv_tile(const BackwardArgs& args, uint32_t* members,
                                               int* scratch) {
  const AttentionParams& call = args.params.call;
  const uint32_t blocks =
      (static_cast<uint32_t>(args.params.max_kv_len) + C::kBlockM - 1) / C::kBlockM;
  const uint32_t batch = call.batch;
  const int num_groups = static_cast<int>(args.by_value ? call.num_v_heads : call.num_k_heads);
  KvTile tile;
  tile.first_key = blockIdx.x % blocks * C::kBlockM;
  tile.b = blockIdx.x / blocks % batch;
  tile.group = group_at<C::kThreads>(args, num_groups, blockIdx.x / blocks / batch, scratch);
  const Queries queries = queries_of(call, tile.b);
  tile.first_slot = static_cast<int>(first_slot(call, tile.b));
  // Packed sequences have the same keys in every head, dense tensors rows for more than they use.
  tile.end_key =
      static_cast<int>(call.q_offsets == nullptr ? call.kv_len : kv_length(call, tile.b, 0));
  tile.q_len = static_cast<int>(queries.count);
  tile.q_batch = queries.b;
  tile.first_token = queries.first;
  tile.first_numbers = first_numbers(args, tile.b);
  const int heads = static_cast<int>(call.num_heads), lane = threadIdx.x % 32;
  for (int h = threadIdx.x; h - lane < heads; h += C::kThreads) {
    const unsigned mine = __ballot_sync(~0u, h < heads && group_of(args, h) == tile.group);
    if (lane == 0) members[h / 32] = mine;
  }
  return tile;
}

// The first block of tokens of the group's heads from `head` on.
template <class C>
__device__ __forceinline__ KvStep first_step(const BackwardArgs& args, const KvTile& tile,
                                             const uint32_t* members, int head) {
  const AttentionParams& call = args.params.call;
  const int heads = static_cast<int>(call.num_heads);
  while (head < heads) {
    const uint32_t rest = members[head / 32] >> head % 32;
    if (rest == 0) {
      head = (head / 32 + 1) * 32;
      continue;
    }
    KvStep step;
    step.head = head += __ffs(static_cast<int>(rest)) - 1;
    step.k_head = call.head_map[head];
    step.v_head = call.value_head_map == nullptr ? step.k_head : call.value_head_map[head];
    step.length = static_cast<int>(kv_length(call, tile.b, step.k_head));
    // A token at `position` sees key j where position - left <= j <= position + right. A bound that
    // is none lies where no token, and no later key's, comes near.
    const int64_t first_position = tile.first_key - (step.length - tile.q_len);
    int64_t low = -2 * C::kBlockM, high = INT32_MAX - 2 * C::kBlockM;
    if (call.window_right >= 0) low = max(low, first_position - call.window_right);
    if (call.window_left >= 0) high = min(high, first_position + call.window_left + 1);
    step.low = static_cast<int>(low);
    step.high = static_cast<int>(high);
    step.token = max(step.low, 0) / C::kBlockN * C::kBlockN;
    step.stop = tile.first_key < step.length ? min(step.high + C::kBlockM - 1, tile.q_len) : 0;
    step.first = true;
    if (step.token < step.stop) return step;
    ++head;
  }
  return {-1, 0, 0, 0, 0, 0, 0, 0, false};
}

template <class C>
__device__ __forceinline__ KvStep next_step(const BackwardArgs& args, const KvTile& tile,
                                            const uint32_t* members, const KvStep& step) {
  if (step.token + C::kBlockN >= step.stop) {
    return first_step<C>(args, tile, members, step.head + 1);
  }
  KvStep next = step;
  next.token += C::kBlockN;
  next.first = false;
  return next;
}

}  // namespace gqa::cuda::sm80
