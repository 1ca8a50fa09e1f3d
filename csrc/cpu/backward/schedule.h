// Cuts one backward call into tasks: (sequence, KV head, run of row blocks).
//
// A task loops over its rows (query tokens x heads of the group) in blocks and, for each block,
// over the keys that the block sees. It sums dK and dV of the whole group in fp32 on the way, and
// finishes dQ of a block with the block's last key. So nothing is computed twice, and no two tasks
// write the same memory. A KV head with more work than a thread's share is cut into several tasks.
// Each has sums of its own, which are added in the order of the tasks (sums.h).
//
// If a value map groups the heads differently from the key map, no task can own both dK and dV. A
// second set of tasks, by value head, then recomputes the probabilities for dV.
#pragma once

#include <cstdint>
#include <vector>

#include "../forward/schedule.h"

namespace gqa::cpu {

struct BackwardTask {
  int32_t batch;
  int32_t k_head, v_head;          // -1: its gradient (of K and Q, or of V) is another task's
  int32_t block_begin, block_end;  // slice of BackwardSchedule::blocks
  int64_t key_begin, key_end;      // of its sums: all keys that its blocks see; of part 0, to
                                   // which the others are added, all that any part's blocks see
  int32_t part, num_parts;         // this task among those of its KV head
  int32_t merge;                   // which merge it takes part in; -1 where num_parts is 1
  int64_t cost;                    // multiply-adds, roughly; of the KV head's parts on average
};

struct BackwardSchedule {
  std::vector<int32_t> heads;          // query heads, group after group
  std::vector<int32_t> invalid_heads;  // query heads whose map entry names no KV head
  std::vector<Task> blocks;            // of rows: the fields up to kv_length
  std::vector<BackwardTask> tasks;     // longest first; a KV head's parts in order, side by side
  TileShape tile;
  int num_workers;
  int num_merges;
};

// batch_invariant: of the forward, whose scores the backward sums in the same order.
BackwardSchedule make_backward_schedule(const AttentionParams& params, const MaskBlocks& masks,
                                        bool batch_invariant, int num_threads);

}  // namespace gqa::cpu
