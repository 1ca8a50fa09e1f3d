// Rows of a group: which query heads and tokens make up a tile.
//
// A group is the query heads that read one (key head, value head) pair; its rows are heads x query
// tokens, token fastest. Groups are taken in the order of their first head, and each is cut into
// tiles of kRows rows. The CTA that needs a tile finds it in the head map itself: no plan lies in
// memory, no launch comes before, and a map that changes between graph replays is simply read
// again. Every thread ranks one head among all of them, so that the search takes as long for many
// groups as for one.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "scan.cuh"

namespace gqa::cuda {

// At most so many tiles exist for any map of this shape. The last tile of a group may be partial,
// and heads whose entry is out of range form one more group.
inline int64_t most_group_tiles(const AttentionParams& params, int64_t rows_per_tile) {
  const int64_t pairs =
      params.value_head_map ? params.num_k_heads * params.num_v_heads : params.num_k_heads;
  const int64_t groups = pairs + 1 < params.num_heads ? pairs + 1 : params.num_heads;
  return (params.num_heads * params.q_len + (rows_per_tile - 1) * groups) / rows_per_tile;
}

struct GroupTile {
  int k_head, v_head;  // -1: the entries of these heads are out of range
  int num_rows;        // 0: there is no such tile
};

struct GroupRow {
  int head, token;  // head -1: the tile has no such row
};

// A number for the pair of KV heads that query head `head` reads; -1 if an entry is out of range.
__device__ __forceinline__ int group_key(const AttentionParams& params, int head) {
  const int num_k = static_cast<int>(params.num_k_heads);
  const int num_v = static_cast<int>(params.num_v_heads);
  const int k_head = params.head_map[head];
  const int v_head = params.value_head_map ? params.value_head_map[head] : k_head;
  if (k_head < 0 || k_head >= num_k || v_head < 0 || v_head >= num_v) return -1;
  return k_head * num_v + v_head;
}

constexpr int kNoGroup = -2;  // no head's key

// How many of the keys [begin, end) equal `key`. Both ends are multiples of 4.
__device__ __forceinline__ int count_equal(const int* keys, int begin, int end, int key) {
  int count = 0;
#pragma unroll 4
  for (int h = begin; h < end; h += 4) {
    const int4 four = *reinterpret_cast<const int4*>(keys + h);
    count += (four.x == key) + (four.y == key) + (four.z == key) + (four.w == key);
  }
  return count;
}

// What the threads of a CTA exchange during the search, in shared memory.
template <int kThreads>
struct GroupSearch {
  int warp_tiles[kThreads / 32];
  int key, size, tile;  // of the group that has the tile: its heads, and which of its tiles it is
};

// Tile number `tile` of a sequence with `q_len` query tokens, by all kThreads threads of a CTA.
//   keys    [Hq, rounded up to a multiple of 4] ints of shared memory, 16-byte aligned
//   rows    [kRows] in shared memory: the tile's rows
// After a barrier `rows` may be read and `keys` written.
template <int kRows, int kThreads>
__device__ __forceinline__ GroupTile find_group_tile(const AttentionParams& params, int q_len,
                                                     int tile, int* keys,
                                                     GroupSearch<kThreads>& search,
                                                     GroupRow* rows) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const unsigned below = (1u << lane) - 1;
  const int num_heads = static_cast<int>(params.num_heads), padded = (num_heads + 3) & ~3;
  for (int h = thread; h < padded; h += kThreads) {
    keys[h] = h < num_heads ? group_key(params, h) : kNoGroup;
  }
  if (thread < kRows) rows[thread] = {-1, 0};
  if (thread == 0) search.key = kNoGroup;
  __syncthreads();  // keys

  int before = 0;         // heads of this thread's group before its own
  int earlier_tiles = 0;  // of groups whose first heads came in earlier passes
  for (int pass = 0; pass < num_heads; pass += kThreads) {
    const int head = pass + thread, warp_first = pass + warp * 32;
    const int key = head < num_heads ? keys[head] : kNoGroup;
    const unsigned same = __match_any_sync(~0u, key);
    before = count_equal(keys, 0, min(warp_first, padded), key) + __popc(same & below);
    const int size =
        before + __popc(same & ~below) + count_equal(keys, warp_first + 32, padded, key);
    const int tiles = key != kNoGroup && before == 0 ? (size * q_len + kRows - 1) / kRows : 0;
    int total;
    const int end = earlier_tiles + scan_threads<kThreads>(tiles, search.warp_tiles, total);
    earlier_tiles += total;
    if (tile < end && tile >= end - tiles) {
      search.key = key, search.size = size, search.tile = tile - (end - tiles);
    }
    __syncthreads();  // the group, if it was found; warp_tiles are read
    if (search.key != kNoGroup) break;
  }
  const int key = search.key;
  if (key == kNoGroup) return {-1, -1, 0};
  const int first_row = search.tile * kRows;
  const int num_rows = min(kRows, search.size * q_len - first_row);
  // Each head of the group writes its own rows of the tile.
  for (int head = thread; head < num_heads; head += kThreads) {
    if (keys[head] != key) continue;
    if (num_heads > kThreads) {  // `before` is of another head
      before = count_equal(keys, 0, head & ~3, key);
      for (int h = head & ~3; h < head; ++h) before += keys[h] == key;
    }
    const int row = before * q_len - first_row;  // of its token 0
    for (int r = max(row, 0); r < min(row + q_len, num_rows); ++r) rows[r] = {head, r - row};
  }
  const int num_v = static_cast<int>(params.num_v_heads);
  return {key < 0 ? -1 : key / num_v, key < 0 ? -1 : key % num_v, num_rows};
}

}  // namespace gqa::cuda
