#include "schedule.h"

#include <algorithm>
#include <set>
#include <utility>

namespace gqa::cpu {
namespace {

// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t kMinCostPerWorker = 200'000;
// Tasks per worker: enough to even out their different lengths.
constexpr int64_t kTasksPerWorker = 3;
// The products of a block of rows: S, dP, dV, dK, dQ.
constexpr int64_t kProducts = 5;
// Rows at which packing a block's K and V costs as much as its products.
constexpr int64_t kLoadRows = 8;

// Rows are a multiple of a strip and of every vector; keys likewise of a panel. Together with K, V,
// Q, dO and dQ of a tile they stay in a 512 KiB second-level cache up to D = Dv = 128.
TileShape tile_shape(const AttentionParams& params) {
  const int64_t dims = params.head_dim + params.value_head_dim;
  return dims <= 128 ? TileShape{144, 96} : dims <= 256 ? TileShape{96, 48} : TileShape{48, 48};
}

// Whether each key head is read with one value head only, and each value head with one key head.
bool heads_pair_up(const std::vector<Group>& groups) {
  std::set<int32_t> k_heads, v_heads;
  for (const Group& group : groups) {
    if (!k_heads.insert(group.k_head).second || !v_heads.insert(group.v_head).second) return false;
  }
  return true;
}

int64_t block_cost(const AttentionParams& params, const Task& block) {
  const int64_t dims = params.head_dim + params.value_head_dim;
  return (block.key_end - block.key_begin) * dims * (kLoadRows + block.num_rows());
}

// Appends the tasks of blocks [begin, end), which share a KV head, cut to about `target` each.
void add_parts(const AttentionParams& params, int32_t begin, int32_t end, int64_t target,
               const BackwardTask& like, BackwardSchedule& schedule) {
  const std::vector<Task>& blocks = schedule.blocks;
  int64_t total = 0;
  for (int32_t i = begin; i < end; ++i) total += block_cost(params, blocks[i]);
  const int64_t wanted = target > 0 ? (total + target - 1) / target : 1;
  const size_t first_task = schedule.tasks.size();
  int64_t before = 0;  // cost of the blocks that have a task
  int32_t next = begin;
  for (int64_t i = 0; next < end; ++i) {
    BackwardTask task = like;
    task.block_begin = next;
    task.key_begin = blocks[next].key_begin;
    task.key_end = blocks[next].key_end;
    while (next < end &&
           (task.cost == 0 || i + 1 == wanted || before + task.cost < total * (i + 1) / wanted)) {
      task.key_begin = std::min(task.key_begin, blocks[next].key_begin);
      task.key_end = std::max(task.key_end, blocks[next].key_end);
      task.cost += block_cost(params, blocks[next++]);
    }
    task.block_end = next;
    before += task.cost;
    task.part = static_cast<int32_t>(i);
    schedule.tasks.push_back(task);
  }
  const int32_t num_parts = static_cast<int32_t>(schedule.tasks.size() - first_task);
  BackwardTask& first = schedule.tasks[first_task];
  for (size_t i = first_task; i < schedule.tasks.size(); ++i) {
    BackwardTask& task = schedule.tasks[i];
    task.num_parts = num_parts;
    task.merge = num_parts > 1 ? schedule.num_merges : -1;
    task.cost = total / num_parts;
    first.key_begin = std::min(first.key_begin, task.key_begin);
    first.key_end = std::max(first.key_end, task.key_end);
  }
  if (num_parts > 1) ++schedule.num_merges;
}

// Appends the tasks of blocks [begin, end of schedule.blocks), sorted by KV head, for the gradients
// that `keys` and `values` select.
void add_tasks(const AttentionParams& params, int32_t begin, bool keys, bool values, int64_t target,
               BackwardSchedule& schedule) {
  const int32_t end = static_cast<int32_t>(schedule.blocks.size());
  const auto head = [&](const Task& block) { return keys ? block.k_head : block.v_head; };
  for (int32_t first = begin; first < end;) {
    const Task& block = schedule.blocks[first];
    int32_t last = first;
    while (last < end && schedule.blocks[last].batch == block.batch &&
           head(schedule.blocks[last]) == head(block)) {
      ++last;
    }
    BackwardTask task{};
    task.batch = block.batch;
    task.k_head = keys ? block.k_head : -1;
    task.v_head = values ? block.v_head : -1;
    add_parts(params, first, last, target, task, schedule);
    first = last;
  }
}

}  // namespace

BackwardSchedule make_backward_schedule(const AttentionParams& params, const MaskBlocks& masks,
                                        bool batch_invariant, int num_threads) {
  BackwardSchedule schedule{};
  schedule.tile = tile_shape(params);
  const std::vector<Group> groups = make_groups(params, schedule.heads, schedule.invalid_heads);
  if (params.q_len == 0) return schedule;
  add_row_blocks(params, masks, groups, schedule.heads, schedule.tile.rows, schedule.blocks);
  for (Task& block : schedule.blocks) block.direct = block.direct && !batch_invariant;

  int64_t cost = 0;
  for (const Task& block : schedule.blocks) cost += block_cost(params, block);
  const int64_t workers = std::min<int64_t>(
      num_threads, std::max<int64_t>(1, cost * kProducts / 2 / kMinCostPerWorker));
  const int64_t target = workers > 1 ? cost / (workers * kTasksPerWorker) + 1 : 0;
  if (heads_pair_up(groups)) {
    add_tasks(params, 0, true, true, target, schedule);
  } else {
    add_tasks(params, 0, true, false, target, schedule);
    std::vector<Task> by_value = schedule.blocks;
    std::stable_sort(by_value.begin(), by_value.end(), [](const Task& x, const Task& y) {
      return std::make_pair(x.batch, x.v_head) < std::make_pair(y.batch, y.v_head);
    });
    const int32_t begin = static_cast<int32_t>(schedule.blocks.size());
    schedule.blocks.insert(schedule.blocks.end(), by_value.begin(), by_value.end());
    add_tasks(params, begin, false, true, target, schedule);
  }

  std::stable_sort(schedule.tasks.begin(), schedule.tasks.end(),
                   [](const BackwardTask& x, const BackwardTask& y) { return x.cost > y.cost; });
  schedule.num_workers =
      static_cast<int>(std::min<int64_t>(workers, static_cast<int64_t>(schedule.tasks.size())));
  return schedule;
}

}  // namespace gqa::cpu
