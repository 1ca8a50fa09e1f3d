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
#pragma once

#include <cstdint>

namespace gqa::cuda::sm90 {

struct Schedule {
  int q_blocks;           // ceil(Sq / kBlockM)
  int units;              // B * Hq
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

// The tile after `tile`; the caller is one thread of the CTA.
__device__ __forceinline__ int next_tile(const Schedule& schedule, int tile) {
  const int stride = static_cast<int>(gridDim.x);
  return schedule.counter == nullptr ? tile + stride : stride + atomicAdd(schedule.counter, 1);
}

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
