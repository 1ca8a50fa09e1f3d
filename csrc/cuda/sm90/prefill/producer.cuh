// The producer thread of the Hopper prefill kernel: takes tiles, finds out which keys they see, and
// keeps Q, K and V coming. The map enters here only, as the head coordinate of K and V.
#pragma once

#include "../../../core/visible.h"
#include "../barrier.cuh"
#include "../tma.cuh"
#include "config.h"

namespace gqa::cuda::sm90 {

// K and V blocks to load for a tile.
struct KeyBlocks {
  int page, k_head, v_head;
  int last_slot, count;  // where the last block begins in the sequence's storage; blocks
};

// Writes to `t` what the consumers need to know of a tile.
template <class C>
__device__ __forceinline__ KeyBlocks describe_tile(const PrefillArguments& arguments,
                                                   const uint16_t* order, int tile, Tile& t) {
  const AttentionParams& params = arguments.attention;
  const TilePlace place = place_tile(arguments.schedule, tile);
  const int num_heads = static_cast<int>(params.num_heads);
  const int head = order[place.unit % num_heads], row0 = place.q_block * C::kBlockM;
  const int batch = place.unit / num_heads;
  KeyBlocks keys;
  t.head = head;
  t.batch = batch;
  t.row0 = row0;
  keys.k_head = params.head_map[head];
  keys.v_head = params.value_head_map == nullptr ? keys.k_head : params.value_head_map[head];
  keys.last_slot = keys.count = 0;
  int length = 0, first_block = 0, dirty_tail = 0;
  const bool valid =
      static_cast<unsigned>(keys.k_head) < static_cast<unsigned>(params.num_k_heads) &&
      static_cast<unsigned>(keys.v_head) < static_cast<unsigned>(params.num_v_heads);
  keys.page = batch;
  bool stored = true;
  if (valid) {
    if (params.page_table != nullptr) {
      keys.page = params.page_table[batch * params.page_table_stride_b +
                                    keys.k_head * params.page_table_stride_h];
      stored = static_cast<unsigned>(keys.page) < static_cast<unsigned>(params.num_pages);
    }
    length = static_cast<int>(kv_length(params, batch, keys.k_head));
    const int last_row = min(row0 + C::kBlockM, static_cast<int>(params.q_len)) - 1;
    const int begin = static_cast<int>(visible_keys(params, length, row0).begin);
    const int end = static_cast<int>(visible_keys(params, length, last_row).end);
    if (begin < end && stored) {
      const int last_block = (end - 1) / C::kBlockN;
      const int first_slot = static_cast<int>(gqa::first_slot(params, batch));
      first_block = begin / C::kBlockN;
      keys.count = last_block - first_block + 1;
      keys.last_slot = first_slot + last_block * C::kBlockN;
      dirty_tail = (last_block + 1) * C::kBlockN > length && first_slot + length < params.kv_len;
    }
  }
  t.k_head = !valid ? kInvalidHead : stored ? keys.k_head : kNoPage;
  t.length = length;
  t.first_block = first_block;
  t.num_blocks = keys.count;
  t.dirty_tail = dirty_tail;
  return keys;
}

template <class C>
__device__ __forceinline__ void produce(const PrefillArguments& arguments, uint32_t base,
                                        Tile* tiles, const uint16_t* order) {
  const Ring<1> q_ring{base + C::kQRing};
  const Ring<kStages> k_ring{base + C::kKRing}, v_ring{base + C::kVRing};
  prefetch_tensor_map(&arguments.q);
  prefetch_tensor_map(&arguments.k);
  prefetch_tensor_map(&arguments.v);

  auto load_block = [&](const Ring<kStages>& ring, const CUtensorMap* map, uint32_t buffers, int n,
                        int slot, int head, int page) {
    ring.wait_empty(n);
    mbarrier_arrive_expect(ring.full(n), C::kKVBytes);
    const uint64_t shared_by_group = evict_last_policy();
#pragma unroll
    for (int c = 0; c < C::kPanels; c++) {
      tma_load(buffers + ring.stage(n) * C::kKVBytes + c * C::kKVPanel, map, ring.full(n),
               shared_by_group, c * 64, slot, head, page);
    }
  };

  int blocks_before = 0;  // K (and V) blocks of earlier tiles
  int tile = static_cast<int>(blockIdx.x), round = 0;
  for (; tile < num_tiles(arguments.schedule); round++) {
    // Consumers have read the tile before last: its Q was released.
    Tile& t = tiles[round % 2];
    const KeyBlocks keys = describe_tile<C>(arguments, order, tile, t);
    // From the last block to the first, in the order that consumers need them: K0 K1 V0 K2 V1 ...
    // Q comes after V0, because those buffers are free before the last tile's Q is.
#pragma unroll 1
    for (int i = 0; i <= keys.count; i++) {
      const int n = blocks_before + i, slot = keys.last_slot - i * C::kBlockN;
      if (i < keys.count) {
        load_block(k_ring, &arguments.k, base + C::kK, n, slot, keys.k_head, keys.page);
      }
      if (i > 0) {
        load_block(v_ring, &arguments.v, base + C::kV, n - 1, slot + C::kBlockN, keys.v_head,
                   keys.page);
      }
      if (i == 1) {
        q_ring.wait_empty(round);
        mbarrier_arrive_expect(q_ring.full(round), C::kQBytes);
        const uint64_t read_once = evict_first_policy();
#pragma unroll
        for (int c = 0; c < C::kPanels; c++) {
          tma_load(base + c * C::kQPanel, &arguments.q, q_ring.full(round), read_once, c * 64,
                   t.row0, t.head, t.batch);
        }
      }
    }
    if (keys.count == 0) {
      q_ring.wait_empty(round);
      mbarrier_arrive(q_ring.full(round));
    }
    blocks_before += keys.count;
    tile = next_tile(arguments.schedule, tile);
  }
  tiles[round % 2] = Tile{kNoMoreTiles};
  q_ring.wait_empty(round);
  mbarrier_arrive(q_ring.full(round));
}

}  // namespace gqa::cuda::sm90
