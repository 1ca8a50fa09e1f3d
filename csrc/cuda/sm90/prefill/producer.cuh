// The producer warp of the Hopper prefill kernel: takes tiles, finds out which keys they see, and
// keeps Q, K and V coming. The map enters here only, as the head coordinate of K and V.
//
// A block of keys lies in one box of K and one of V, or, in pages, in several of equal size.
// Lane l looks after box l of every block: it looks its page up a block ahead, and issues its copies.
#pragma once

#include "../../../core/visible.h"
#include "../../common/ptx.cuh"
#include "../barrier.cuh"
#include "../tma.cuh"
#include "config.h"

namespace gqa::cuda::sm90 {

// A lane's knowledge of its box's page, if it is not a page number.
constexpr int kBeyondKeys = -1;   // the box holds no key: it is loaded as zeros
constexpr int kMissingPage = -2;  // its page is not in storage: keys are NaN, values zeros

// K and V blocks to load for a tile.
struct KeyBlocks {
  int sequence, k_head, v_head;
  int page;             // of all keys, if a sequence has one page
  int first_slot;       // of the sequence's storage that holds a key
  int length;           // keys
  int last_key, count;  // first key of the last block; blocks
};

// The place of a tile among the sequences; head is a place in the order of heads. False: there is no
// such tile.
template <class C>
__device__ __forceinline__ bool find_tile(const PrefillArguments& arguments, PackedTiles& packed,
                                          int tile, int& sequence, TilePlace& place) {
  const AttentionParams& params = arguments.attention;
  if (params.q_offsets == nullptr) {
    if (tile >= num_tiles(arguments.schedule)) return false;
    place = place_tile(arguments.schedule, tile);
    const int num_heads = static_cast<int>(params.num_heads);
    sequence = place.unit / num_heads;
    place.unit %= num_heads;
    return true;
  }
  int first;
  sequence = packed.find<C::kBlockM>(params, tile, first);
  if (sequence < 0) return false;
  Schedule own = arguments.schedule;
  const int tokens = static_cast<int>(queries_of(params, sequence).count);
  own.q_blocks = (tokens + C::kBlockM - 1) / C::kBlockM;
  place = place_tile(own, tile - first);
  return true;
}

// What the consumers need to know of a tile, and what is to be loaded for it.
template <class C>
__device__ __forceinline__ KeyBlocks describe_tile(const PrefillArguments& arguments, int sequence,
                                                   int head, int q_block, Tile& t) {
  const AttentionParams& params = arguments.attention;
  const Queries queries = queries_of(params, sequence);
  t.head = head;
  t.sequence = sequence;
  t.row0 = q_block * C::kBlockM;
  t.q_len = static_cast<int>(queries.count);
  t.batch = static_cast<int>(queries.b);
  t.token0 = static_cast<int>(queries.first);
  KeyBlocks keys;
  keys.sequence = sequence;
  keys.k_head = params.head_map[head];
  keys.v_head = params.value_head_map == nullptr ? keys.k_head : params.value_head_map[head];
  keys.last_key = keys.count = keys.length = keys.first_slot = 0;
  t.to_position = t.first_block = t.dirty_tail = 0;
  const bool valid =
      static_cast<unsigned>(keys.k_head) < static_cast<unsigned>(params.num_k_heads) &&
      static_cast<unsigned>(keys.v_head) < static_cast<unsigned>(params.num_v_heads);
  keys.page = share_storage(params) ? 0 : sequence;
  bool stored = true;
  if (valid) {
    if (params.page_table != nullptr && params.max_pages == 1) {
      keys.page = params.page_table[sequence * params.page_table_stride_b +
                                    keys.k_head * params.page_table_stride_h];
      stored = static_cast<unsigned>(keys.page) < static_cast<unsigned>(params.num_pages);
    }
    keys.length = static_cast<int>(kv_length(params, sequence, keys.k_head));
    t.to_position = keys.length - t.q_len;  // the last token is aligned to the last key
    const int last_row = min(t.row0 + C::kBlockM, t.q_len) - 1;
    const int begin =
        static_cast<int>(keys_around(params, keys.length, t.row0 + t.to_position).begin);
    const int end =
        static_cast<int>(keys_around(params, keys.length, last_row + t.to_position).end);
    if (begin < end && stored) {
      const int last_block = (end - 1) / C::kBlockN;
      keys.first_slot = static_cast<int>(first_slot(params, sequence));
      t.first_block = begin / C::kBlockN;
      keys.count = last_block - t.first_block + 1;
      keys.last_key = last_block * C::kBlockN;
      t.dirty_tail = (last_block + 1) * C::kBlockN > keys.length &&
                     keys.first_slot + keys.length < params.kv_len;
    }
  }
  t.k_head = !valid ? kInvalidHead : stored ? keys.k_head : kNoPage;
  t.length = keys.length;
  t.num_blocks = keys.count;
  return keys;
}

// The page of this lane's box of the block that begins at `key0`.
template <class C>
__device__ __forceinline__ int look_up_page(const PrefillArguments& arguments,
                                            const KeyBlocks& keys, int key0) {
  const AttentionParams& params = arguments.attention;
  if (params.max_pages == 1) return keys.page;
  const int in_block = static_cast<int>(threadIdx.x) * arguments.box_rows, key = key0 + in_block;
  if (in_block >= C::kBlockN || key0 < 0 || key >= keys.length) return kBeyondKeys;
  const int page =
      params.page_table[keys.sequence * params.page_table_stride_b +
                        keys.k_head * params.page_table_stride_h +
                        arguments.by_page_size.quotient(key) * params.page_table_stride_p];
  const bool stored = static_cast<unsigned>(page) < static_cast<unsigned>(params.num_pages);
  return stored ? page : kMissingPage;
}

template <class C>
__device__ __forceinline__ void produce(const PrefillArguments& arguments, uint32_t base,
                                        Tile* tiles, const uint16_t* order) {
  const Ring<1> q_ring{base + C::kQRing};
  const Ring<kStages> k_ring{base + C::kKRing}, v_ring{base + C::kVRing};
  const AttentionParams& params = arguments.attention;
  const int lane = threadIdx.x;
  const bool leads = lane == 0;
  if (leads) {
    prefetch_tensor_map(&arguments.q);
    prefetch_tensor_map(&arguments.k);
    prefetch_tensor_map(&arguments.v);
  }

  // Loads a block of K or V, whose first key is `key0` and whose box of this lane is in `page`.
  auto load_block = [&](const Ring<kStages>& ring, const CUtensorMap* map, uint32_t buffers, int n,
                        const KeyBlocks& keys, int head, int key0, int page, bool missing_is_nan) {
    const int in_block = lane * arguments.box_rows;
    const uint32_t to = buffers + ring.stage(n) * C::kKVBytes + in_block * kPanelBytes;
    int bytes = C::kKVBytes;
    bool mine = in_block < C::kBlockN;
    ring.wait_empty(n);
    if (missing_is_nan && __any_sync(~0u, mine && page == kMissingPage)) {
      const bool missing = mine && page == kMissingPage;
      const int box_bytes = arguments.box_rows * kPanelBytes;
      if (missing) {
        mine = false;
        for (int i = 0; i < box_bytes * C::kPanels; i += 16) {
          st_shared_v4(to + i / box_bytes * C::kKVPanel + i % box_bytes,
                       make_uint4(~0u, ~0u, ~0u, ~0u));
        }
        fence_async_proxy();
      }
      bytes -= __popc(__ballot_sync(~0u, missing)) * box_bytes * C::kPanels;
    }
    __syncwarp();
    if (leads) mbarrier_arrive_expect(ring.full(n), bytes);
    __syncwarp();
    if (!mine) return;
    int slot = keys.first_slot + key0 + in_block;
    if (params.max_pages != 1) {
      slot -= arguments.by_page_size.quotient(slot) * static_cast<int>(params.page_size);
    }
    const uint64_t shared_by_group = evict_last_policy();
#pragma unroll
    for (int c = 0; c < C::kPanels; c++) {
      tma_load(to + c * C::kKVPanel, map, ring.full(n), shared_by_group, c * 64, slot, head, page);
    }
  };

  PackedTiles packed{0, 0, 0};
  if (params.q_offsets != nullptr) packed.count<C::kBlockM>(params);
  int blocks_before = 0;  // K (and V) blocks of earlier tiles
  int tile = static_cast<int>(blockIdx.x), round = 0;
  int sequence;
  TilePlace place;
  for (; find_tile<C>(arguments, packed, tile, sequence, place); round++) {
    // Consumers have read the tile before last: its Q was released.
    Tile t;
    const KeyBlocks keys =
        describe_tile<C>(arguments, sequence, order[place.unit], place.q_block, t);
    if (leads) tiles[round % 2] = t;
    // From the last block to the first, in the order that consumers need them: K0 K1 V0 K2 V1 ...
    // Q comes after V0, because those buffers are free before the last tile's Q is.
    int page = look_up_page<C>(arguments, keys, keys.last_key), page_before = 0;
#pragma unroll 1
    for (int i = 0; i <= keys.count; i++) {
      const int n = blocks_before + i, key0 = keys.last_key - i * C::kBlockN;
      const int next_page = look_up_page<C>(arguments, keys, key0 - C::kBlockN);
      if (i < keys.count) {
        load_block(k_ring, &arguments.k, base + C::kK, n, keys, keys.k_head, key0, page, true);
      }
      if (i > 0) {
        load_block(v_ring, &arguments.v, base + C::kV, n - 1, keys, keys.v_head, key0 + C::kBlockN,
                   page_before, false);
      }
      if (i == 1) {
        q_ring.wait_empty(round);
        if (leads) {
          mbarrier_arrive_expect(q_ring.full(round), C::kQBytes);
          const uint64_t read_once = evict_first_policy();
#pragma unroll
          for (int c = 0; c < C::kPanels; c++) {
            tma_load(base + c * C::kQPanel, &arguments.q, q_ring.full(round), read_once, c * 64,
                     t.token0 + t.row0, t.head, t.batch);
          }
        }
      }
      page_before = page;
      page = next_page;
    }
    if (keys.count == 0) {
      q_ring.wait_empty(round);
      if (leads) mbarrier_arrive(q_ring.full(round));
    }
    blocks_before += keys.count;
    tile = next_tile(arguments.schedule, tile);
  }
  if (leads) tiles[round % 2] = Tile{kNoMoreTiles};
  q_ring.wait_empty(round);
  if (leads) mbarrier_arrive(q_ring.full(round));
}

}  // namespace gqa::cuda::sm90
