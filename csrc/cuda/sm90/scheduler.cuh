// Which output tile a CTA does next. A tile is kBlockM query tokens of one (sequence, query head),
// a unit. Persistent CTAs take tiles in one order:
//
//   section   so many units as have K and V that fit in L2 together; sections one after another
//   block     of query tokens; those that see most keys first, so that the last tiles are short
//   unit      of the section: by sequence, then by head, heads of a group side by side
//
// so that CTAs running together read the same K and V tiles out of L2, however the heads of a group
// lie. Tiles are of one length without causal order: CTA c takes c, c + G, ... Otherwise CTAs draw
// the next tile from a counter in global memory.
//
// Packed sequences come one after another, each in the order above. Where a sequence's tiles begin
// only the device knows: the warp that takes tiles counts those of 32 sequences at a time (the idea
// of FlashAttention-3's VarlenDynamicPersistentTileScheduler).
#pragma once

#include <cstdint>

#include "../../core/visible.h"

namespace gqa::cuda::sm90 {

struct Schedule {
  int q_blocks;           // ceil(Sq / kBlockM); of packed sequences those of one
  int units;              // B * Hq; of packed sequences Hq
  int section;            // units of a section; the last section may have fewer
  bool last_block_first;  // later query tokens see more keys
  int* counter;           // tiles drawn beyond the first of each CTA; nullptr: none is drawn
};

// Place of a tile in the tensors; q_block is in units of kBlockM.
struct TilePlace {
  int unit, q_block;
};

__device__ __forceinline__ int num_tiles(const Schedule& schedule) {
  return schedule.q_blocks * schedule.units;
}

__device__ __forceinline__ TilePlace place_tile(const Schedule& schedule, int tile) {
  const int section = tile / (schedule.section * schedule.q_blocks);
  const int first_unit = section * schedule.section;
  const int units = min(schedule.section, schedule.units - first_unit);
  const int rest = tile - first_unit * schedule.q_blocks;
  const int block = rest / units;
  return {first_unit + rest % units,
          schedule.last_block_first ? schedule.q_blocks - 1 - block : block};
}

// The tile after `tile`; the caller is one warp of the CTA.
__device__ __forceinline__ int next_tile(const Schedule& schedule, int tile) {
  const int stride = static_cast<int>(gridDim.x);
  if (schedule.counter == nullptr) return tile + stride;
  int drawn = 0;
  if (threadIdx.x % 32 == 0) drawn = atomicAdd(schedule.counter, 1);
  return stride + __shfl_sync(~0u, drawn, 0);
}

// Finds the sequence of a tile of packed sequences. One warp has it; tiles must not decrease.
struct PackedTiles {
  int sequence0;  // lane l looks after sequence sequence0 + l
  int before;     // tiles of sequences before sequence0
  int end;        // and of those up to the lane's

  template <int kBlockM>
  __device__ __forceinline__ void count(const AttentionParams& params) {
    const int lane = threadIdx.x % 32, sequence = sequence0 + lane;
    int tiles = 0;
    if (sequence < static_cast<int>(params.batch)) {
      const int tokens = static_cast<int>(queries_of(params, sequence).count);
      tiles = (tokens + kBlockM - 1) / kBlockM * static_cast<int>(params.num_heads);
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, tiles, d);
      if (lane >= d) tiles += other;
    }
    end = before + tiles;
  }

  // The sequence that `tile` belongs to, with the number of its first tile in `first`; -1: there is
  // no such tile.
  template <int kBlockM>
  __device__ __forceinline__ int find(const AttentionParams& params, int tile, int& first) {
#pragma unroll 1
    while (true) {
      const unsigned later = __ballot_sync(~0u, tile < end);
      if (later != 0) {
        const int lane = __ffs(later) - 1;
        const int previous = __shfl_sync(~0u, end, max(lane - 1, 0));
        first = lane == 0 ? before : previous;
        return sequence0 + lane;
      }
      if (sequence0 + 32 >= static_cast<int>(params.batch)) return -1;
      before = __shfl_sync(~0u, end, 31);
      sequence0 += 32;
      count<kBlockM>(params);
    }
  }
};

constexpr int kMaxHeads = 512;

// order[i]: the i-th query head when heads are sorted by (key head, value head), those with an
// invalid map entry last. All threads of the CTA call it; `keys` is scratch for num_heads ints. The
// caller synchronises before `order` is read.
__device__ __forceinline__ void order_heads(const int32_t* head_map, const int32_t* value_head_map,
                                            int num_heads, int num_k_heads, int num_v_heads,
                                            int* keys, uint16_t* order) {
  for (int h = threadIdx.x; h < num_heads; h += blockDim.x) {
    const int k_head = head_map[h];
    const int v_head = value_head_map == nullptr ? k_head : value_head_map[h];
    const bool valid = static_cast<unsigned>(k_head) < static_cast<unsigned>(num_k_heads) &&
                       static_cast<unsigned>(v_head) < static_cast<unsigned>(num_v_heads);
    keys[h] = valid ? k_head * num_v_heads + v_head : INT32_MAX;
  }
  __syncthreads();
  for (int h = threadIdx.x; h < num_heads; h += blockDim.x) {
    const int key = keys[h];
    int rank = 0;
    for (int other = 0; other < num_heads; other++) {
      rank += keys[other] < key || (keys[other] == key && other < h);
    }
    order[rank] = static_cast<uint16_t>(h);
  }
}

}  // namespace gqa::cuda::sm90
