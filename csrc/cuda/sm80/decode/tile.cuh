// Determines a CTA's rows and keys, and writes the results if it has no keys to read.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/copy_rows.cuh"
#include "../../common/group_rows.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "config.h"
#include "parts.cuh"
#include "store.cuh"

namespace gqa::cuda::sm80 {

// Shared memory through which threads find their tile.
struct DecodeSearch {
  PartSearch parts;
  GroupSearch<kDecodeThreads> groups;
};

// What all threads of a CTA know about their tile.
struct DecodeTile {
  DecodePart part;
  int b;
  GroupTile group;
  Queries queries;
  int length;      // keys of the sequence
  int begin, end;  // of this split
};

// The keys that any row of the tile sees, cut into splits of whole blocks.
__device__ __forceinline__ void cut_keys(const DecodeParams& p, const GroupRow* rows,
                                         DecodeTile& tile) {
  int first = INT32_MAX, last = 0;
  for (int r = 0; r < tile.group.num_rows; ++r) {
    first = min(first, rows[r].token);
    last = max(last, rows[r].token);
  }
  const int64_t shift = tile.length - tile.queries.count;
  const int begin = static_cast<int>(keys_around(p.attention, tile.length, shift + first).begin);
  const int end = static_cast<int>(keys_around(p.attention, tile.length, shift + last).end);
  const int blocks = end <= begin ? 0 : (end - begin + kDecodeBlock - 1) / kDecodeBlock;
  const int chunk = (blocks + tile.part.splits - 1) / tile.part.splits * kDecodeBlock;
  tile.begin = begin + tile.part.split * chunk;
  tile.end = min(end, tile.begin + chunk);
}

// Rows that have nothing to read: no key in this split (0, LSE -inf), or no KV head (NaN).
__device__ __forceinline__ void write_unread_rows(const DecodeParams& p, const DecodeTile& tile,
                                                  const GroupRow* rows, bool bf16, bool elements) {
  const AttentionParams& a = p.attention;
  const bool bad = tile.group.k_head < 0;
  const float fill = bad ? not_a_number() : 0.f, lse = bad ? not_a_number() : minus_infinity();
  const int lane = threadIdx.x & 31, dim = static_cast<int>(a.value_head_dim);
  for (int r = threadIdx.x / 32; r < tile.group.num_rows; r += kDecodeWarps) {
    const auto [head, token] = rows[r];
    if (tile.part.splits > 1) {
      if (lane == 0) p.partial_lse[partial_row(a, tile.part.number, head, token)] = lse;
      continue;
    }
    uint16_t* out = static_cast<uint16_t*>(a.out) + out_offset(a, tile.queries, head, token);
    for (int d = lane * 4; d < dim; d += 128) {
      store_out(out + d, make_float4(fill, fill, fill, fill), dim - d, bf16, elements);
    }
    if (lane == 0) a.lse[lse_offset(a, tile.queries, head, token)] = lse;
  }
}

// Finds this CTA's tile in the head map. `scratch` is Hq ints of shared memory, rounded up to a
// multiple of 4; `rows` and `search` are shared memory, too. A surplus CTA gets a tile without rows.
__device__ __forceinline__ DecodeTile find_tile(const DecodeParams& p, int* scratch,
                                                DecodeSearch& search, GroupRow* rows) {
  const AttentionParams& a = p.attention;
  const int number = blockIdx.x / p.tiles, group_tile = blockIdx.x % p.tiles;
  DecodeTile tile;
  if (p.splits > 0) {
    const int batch = static_cast<int>(a.batch);
    tile.part = {number % batch, number / batch, p.splits, number};
  } else {
    tile.part = find_part(p, number, search.parts);
    if (tile.part.b < 0) {
      tile.group.num_rows = 0;
      return tile;
    }
    if (group_tile == 0 && tile.part.split == 0 && threadIdx.x == 0) {
      p.sequence_parts[2 * tile.part.b] = number;
      p.sequence_parts[2 * tile.part.b + 1] = tile.part.splits;
    }
  }
  tile.b = tile.part.b;
  tile.queries = queries_of(a, tile.b);
  tile.group = find_group_tile<kDecodeRows>(a, static_cast<int>(tile.queries.count), group_tile,
                                            scratch, search.groups, rows);
  __syncthreads();  // the rows are known, the scratch is free
  tile.length = 0;
  tile.begin = tile.end = 0;
  if (tile.group.num_rows > 0 && tile.group.k_head >= 0) {
    tile.length = static_cast<int>(kv_length(a, tile.b, tile.group.k_head));
    cut_keys(p, rows, tile);
  }
  return tile;
}

}  // namespace gqa::cuda::sm80
