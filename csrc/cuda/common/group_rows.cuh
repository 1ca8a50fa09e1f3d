// Rows of a group: which query heads and tokens make up a tile.
//
// A group is the query heads that read one (key head, value head) pair; its rows are heads x query
// tokens, token fastest. Groups are taken in the order of their first head, and each is cut into
// tiles of kRows rows. The warp that needs a tile finds it in the head map itself: no plan lies in
// memory, no launch comes before, and a map that changes between graph replays is simply read
// again.
#pragma once

#include <cstdint>

#include "../../core/params.h"

namespace gqa::cuda {

// Over every map of this shape there are at most so many tiles: a group's last tile may be partial,
// and heads whose entry is out of range make up one more group.
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

// A number for the pair of KV heads that query head `head` reads; -1 where an entry is out of
// range.
__device__ __forceinline__ int group_key(const AttentionParams& params, int head) {
  const int num_k = static_cast<int>(params.num_k_heads);
  const int num_v = static_cast<int>(params.num_v_heads);
  const int k_head = params.head_map[head];
  const int v_head = params.value_head_map ? params.value_head_map[head] : k_head;
  if (k_head < 0 || k_head >= num_k || v_head < 0 || v_head >= num_v) return -1;
  return k_head * num_v + v_head;
}

// Tile number `tile` of a sequence with `q_len` query tokens, by one whole warp.
//   keys  [Hq] ints of shared memory, for this warp alone until it returns
//   rows  [kRows] in shared memory: the tile's rows, valid after a barrier with this warp
template <int kRows>
__device__ __forceinline__ GroupTile find_group_tile(const AttentionParams& params, int q_len,
                                                     int tile, int* keys, GroupRow* rows) {
  constexpr int kPassed = -2;
  const int lane = threadIdx.x & 31, num_heads = static_cast<int>(params.num_heads);
  const int num_v = static_cast<int>(params.num_v_heads);
  for (int h = lane; h < num_heads; h += 32) keys[h] = group_key(params, h);
  __syncwarp();  // keys are read across lanes
  for (int first = 0; first < num_heads;) {
    const int key = keys[first];
    int group_size = 0, next = num_heads;
    for (int h0 = first & ~31; h0 < num_heads; h0 += 32) {
      const int mine = h0 + lane < num_heads ? keys[h0 + lane] : kPassed;
      group_size += __popc(__ballot_sync(~0u, mine == key));
      const unsigned others = __ballot_sync(~0u, mine != key && mine != kPassed);
      if (others && next == num_heads) next = h0 + __ffs(others) - 1;
    }
    const int group_rows = group_size * q_len, tiles = (group_rows + kRows - 1) / kRows;
    if (tile < tiles) {
      const int first_row = tile * kRows, first_member = first_row / q_len;
      const int num_rows = min(kRows, group_rows - first_row);
      // Each head of the group writes its own rows of the tile.
      int rank = 0;
      for (int h0 = first & ~31; h0 < num_heads; h0 += 32) {
        const bool same = h0 + lane < num_heads && keys[h0 + lane] == key;
        const unsigned members = __ballot_sync(~0u, same);
        const int member = rank + __popc(members & ((1u << lane) - 1));
        if (same && member >= first_member) {
          const int row = member * q_len - first_row;  // of its token 0
          for (int r = max(row, 0); r < min(row + q_len, num_rows); ++r) {
            rows[r] = {h0 + lane, r - row};
          }
        }
        rank += __popc(members);
      }
      if (lane >= num_rows && lane < kRows) rows[lane] = {-1, 0};
      return {key < 0 ? -1 : key / num_v, key < 0 ? -1 : key % num_v, num_rows};
    }
    tile -= tiles;
    __syncwarp();  // every lane has read keys[first]
    for (int h = (first & ~31) + lane; h < num_heads; h += 32) {
      if (keys[h] == key) keys[h] = kPassed;
    }
    __syncwarp();
    first = next;
  }
  return {-1, -1, 0};
}

}  // namespace gqa::cuda
