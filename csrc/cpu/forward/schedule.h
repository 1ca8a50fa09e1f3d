// Cuts one attention call into tasks: (sequence, group, block of rows, run of keys).
//
// A group is the query heads that read one (key head, value head) pair. The rows of a task are
// query tokens x heads of the group (token-major), so that each K and V element is read once for
// all of them. The schedule depends on shapes, maps, lengths and masks, never on elements of Q, K or
// V.
//
// A worker takes a bundle of tasks at a time. That is one task or, if the memory of one head's keys
// is fragmented by other heads (small pages, or heads within tokens), the tasks of several groups
// over the same keys, so that memory is read in its own order and not head after head.
#pragma once

#include <cstdint>
#include <vector>

#include "../../core/params.h"
#include "../mask_blocks.h"

namespace gqa::cpu {

// Groups with at most this many rows in a sequence read K and V in place (products_direct.h);
// others pack them.
constexpr int kMaxDirectRows = 16;
// Most keys of a tile where all tasks are such, and of any tile.
constexpr int kMaxDirectKeys = 64;
constexpr int kMaxTileKeys = 128;

// Rows and keys of the tiles that the kernels work on.
struct TileShape {
  int rows;  // most rows of a task
  int keys;  // keys of one step of the online softmax
  // Whether any task packs K and V.
  bool packs = true;
  // Keys whose results are merged separately, counted from a sequence's first key; 0: no such runs.
  int64_t segment_keys = 0;
};

// Limits of the tile shape, by the caches of processors with an instruction set.
struct TileLimits {
  int64_t floats;  // of Q, S, O, K and V that stay in the second-level cache
  int rows;
};
// A second-level cache of 512 KiB: processors without AVX-512. Those with it have 1 MiB or more.
constexpr TileLimits kSmallCacheTiles{96 * 1024, 192};
constexpr TileLimits kLargeCacheTiles{192 * 1024, 192};
// Packing K and V costs AMX as much as their products with about 60 rows: few tasks, of many rows.
constexpr TileLimits kAmxTiles{256 * 1024, 384};
// Most rows of any limits.
constexpr int kMaxTileRows = 384;

struct Task {
  int32_t batch, k_head, v_head;
  int32_t head_begin, head_end;    // slice of Schedule::heads
  int64_t token_begin, token_end;  // query tokens; a sequence's last one is number Sq - 1
  int64_t token_offset;            // from there to the token's place in q, out and lse
  int64_t key_begin, key_end;      // keys of this split
  int64_t kv_length;               // valid keys of this (sequence, key head)
  int32_t split, num_splits;       // this split of the task's keys
  int32_t merge;                   // which merge it takes part in; -1 where num_splits is 1
  int64_t partial;                 // floats before the partial result of split 0
  int64_t cost;                    // multiply-adds, roughly
  // Whether K and V are read in place: the sequence has at most kMaxDirectRows rows in the task's
  // group, and the call need not be batch invariant. The number of rows of the task must not decide this, because the backward cuts groups
  // differently and has to sum the scores in the same order.
  bool direct;

  int num_heads() const { return head_end - head_begin; }
  int num_rows() const { return static_cast<int>(token_end - token_begin) * num_heads(); }
};

// Tasks that one worker runs together: of one sequence, over the same keys.
struct Bundle {
  int64_t first;  // of Schedule::tasks
  int count;
  int64_t cost;  // of all of them
};

struct Schedule {
  std::vector<int32_t> heads;          // query heads, group after group
  std::vector<int32_t> invalid_heads;  // query heads whose map entry names no KV head
  std::vector<Task> tasks;             // those of a bundle one after the other
  std::vector<Bundle> bundles;         // longest first
  TileShape tile;
  int num_workers;         // bundles worth running at the same time
  int num_merges;          // tasks whose keys are split
  int64_t partial_floats;  // room for the partial results of all splits
};

// Floats of one row's partial result: its maximum, its sum, and value_head_dim output elements.
inline int64_t partial_row_floats(const AttentionParams& params) {
  return params.value_head_dim + 2;
}

// batch_invariant: a row's result must not depend on what else is in the call, nor on num_threads.
// All tasks then pack K and V, because direct tasks sum in an order that depends on their number of
// rows. Tiles begin at multiples of their size, and splits are segments.
Schedule make_schedule(const AttentionParams& params, const MaskBlocks& masks, bool batch_invariant,
                       const TileLimits& limits, int num_threads);

// The query heads that read one (key head, value head) pair.
struct Group {
  int32_t k_head, v_head;
  int32_t head_begin, head_end;  // slice of the sorted heads
};

// Sorts the query heads by the pair they read, stably, into `heads`; those whose map entry names no
// KV head go to `invalid_heads`.
std::vector<Group> make_groups(const AttentionParams& params, std::vector<int32_t>& heads,
                               std::vector<int32_t>& invalid_heads);

// Appends the rows of every (sequence, group), cut into blocks of at most max_rows.
void add_row_blocks(const AttentionParams& params, const MaskBlocks& masks,
                    const std::vector<Group>& groups, const std::vector<int32_t>& heads,
                    int max_rows, std::vector<Task>& tasks);

}  // namespace gqa::cpu
