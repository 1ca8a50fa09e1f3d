#include "schedule.h"

#include <algorithm>
#include <tuple>

#include "../../core/visible.h"

namespace gqa::cpu {
namespace {

// Reading one K or V element into registers costs about as much as using it for this many rows.
constexpr int64_t kLoadRows = 6;
// Multiply-adds below which waking another thread costs more than it saves: some 20 microseconds
// of work. (One that sleeps, as with OMP_WAIT_POLICY=PASSIVE, takes 50 and more to wake.)
constexpr int64_t kMinCostPerWorker = 1'500'000;
// Tasks per worker that even out their different lengths.
constexpr int64_t kTasksPerWorker = 6;
// Splits shorter than this spend too much on their merge.
constexpr int64_t kMinSplitKeys = 256;
// Segments of batch invariant calls: a whole number of tiles.
constexpr int64_t kSegmentKeys = 1024;
constexpr int kMinTileRows = 48;

// Bytes of K and V in a tile that is not packed, for a first-level cache of 32 KiB: V is prefetched
// while K is used. With half as many, 16-bit decode is slower: some costs of a tile don't depend on
// its number of keys (the softmax's horizontal maximum and sum, loads and stores of the output).
constexpr int64_t kDirectTileBytes = 32 * 1024;
constexpr int kMinDirectKeys = 32;

// Tasks are bundled if runs of one head's keys are shorter than this. The processor's own
// prefetching copes with longer runs.
constexpr int64_t kMinPieceBytes = 64 * 1024;
// Most rows of a bundle's tasks: its q and o stay in a second-level cache.
constexpr int64_t kMaxBundleRows = 64;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

TileShape tile_shape(const AttentionParams& params, const TileLimits& limits) {
  const int64_t dims = params.head_dim + params.value_head_dim;
  TileShape tile{limits.rows, kMaxTileKeys};
  while (tile.rows * dims + tile.keys * dims + tile.rows * tile.keys > limits.floats &&
         tile.rows > kMinTileRows) {
    if (tile.keys > 64) {
      tile.keys /= 2;
    } else {
      tile.rows -= 24;
    }
  }
  return tile;
}

// Of an element of storage, which holds two numbers of int4.
int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    default: return 1;
  }
}

int64_t row_bytes(DType dtype, int64_t dims) {
  return dims * element_bytes(dtype) / (dtype == DType::kInt4 ? 2 : 1);
}

// Keys of a tile that are read where they lie: K and V stay in the first-level cache from their
// prefetch to their use.
int direct_tile_keys(const AttentionParams& params) {
  const int64_t bytes =
      row_bytes(params.k_dtype, params.head_dim) + row_bytes(params.v_dtype, params.value_head_dim);
  int keys = kMaxDirectKeys;
  while (keys > kMinDirectKeys && keys * bytes > kDirectTileBytes) keys /= 2;
  return keys;
}

// Leaves out keys at either end that the mask or key ranges hide from all rows.
void clip_to_seen(const AttentionParams& params, const MaskBlocks& masks,
                  const std::vector<int32_t>& heads, Task& task) {
  int64_t begin = task.key_end, end = task.key_begin;
  const int32_t head_end = masks.same_for_heads() ? task.head_begin + 1 : task.head_end;
  for (int64_t t = task.token_begin; t < task.token_end; ++t) {
    for (int32_t i = task.head_begin; i < head_end; ++i) {
      const KeyRange keys = masks.keys(task.batch, heads[i], query_number(params, task.batch, t),
                                       {task.key_begin, task.key_end});
      if (keys.begin >= keys.end) continue;
      begin = std::min(begin, keys.begin);
      end = std::max(end, keys.end);
    }
  }
  task.key_begin = std::max(task.key_begin, begin);
  task.key_end = std::min(task.key_end, end);
}

}  // namespace

std::vector<Group> make_groups(const AttentionParams& params, std::vector<int32_t>& heads,
                               std::vector<int32_t>& invalid_heads) {
  const int32_t* k_map = params.head_map;
  const int32_t* v_map = params.value_head_map ? params.value_head_map : params.head_map;
  heads.reserve(params.num_heads);
  for (int32_t h = 0; h < params.num_heads; ++h) {
    const bool valid = k_map[h] >= 0 && k_map[h] < params.num_k_heads && v_map[h] >= 0 &&
                       v_map[h] < params.num_v_heads;
    (valid ? heads : invalid_heads).push_back(h);
  }
  const auto before = [&](int32_t x, int32_t y) {
    return std::tie(k_map[x], v_map[x], x) < std::tie(k_map[y], v_map[y], y);
  };
  if (!std::is_sorted(heads.begin(), heads.end(), before)) {
    std::sort(heads.begin(), heads.end(), before);
  }
  std::vector<Group> groups;
  groups.reserve(params.num_k_heads);
  for (int32_t i = 0; i < static_cast<int32_t>(heads.size()); ++i) {
    const int32_t h = heads[i];
    if (groups.empty() || groups.back().k_head != k_map[h] || groups.back().v_head != v_map[h]) {
      groups.push_back({k_map[h], v_map[h], i, i});
    }
    groups.back().head_end = i + 1;
  }
  return groups;
}

void add_row_blocks(const AttentionParams& params, const MaskBlocks& masks,
                    const std::vector<Group>& groups, const std::vector<int32_t>& heads_of_groups,
                    int max_rows, std::vector<Task>& tasks) {
  const int64_t dims = params.head_dim + params.value_head_dim;
  tasks.reserve(tasks.size() + params.batch * groups.size());
  for (int32_t b = 0; b < params.batch; ++b) {
    const int64_t q_len =
        params.q_offsets == nullptr ? params.q_len : params.q_offsets[b + 1] - params.q_offsets[b];
    if (q_len == 0) continue;
    for (const Group& group : groups) {
      const int64_t length = kv_length(params, b, group.k_head);
      const int64_t group_heads = group.head_end - group.head_begin;
      const int64_t head_blocks = div_up(group_heads, max_rows);
      const int64_t heads = div_up(group_heads, head_blocks);
      const int64_t token_blocks = div_up(q_len, max_rows / heads);
      const int64_t tokens = div_up(q_len, token_blocks);
      for (int64_t h = group.head_begin; h < group.head_end; h += heads) {
        for (int64_t t = params.q_len - q_len; t < params.q_len; t += tokens) {
          Task task{};
          task.batch = b;
          task.k_head = group.k_head;
          task.v_head = group.v_head;
          task.head_begin = static_cast<int32_t>(h);
          task.head_end = static_cast<int32_t>(std::min<int64_t>(h + heads, group.head_end));
          task.token_begin = t;
          task.token_end = std::min(t + tokens, params.q_len);
          if (params.q_offsets != nullptr)
            task.token_offset = params.q_offsets[b + 1] - params.q_len;
          task.kv_length = length;
          task.key_begin = visible_keys(params, length, t).begin;
          task.key_end = visible_keys(params, length, task.token_end - 1).end;
          if (masks.hides_keys()) clip_to_seen(params, masks, heads_of_groups, task);
          if (task.key_end < task.key_begin) task.key_end = task.key_begin;
          task.direct = q_len * group_heads <= kMaxDirectRows;
          task.num_splits = 1;
          task.merge = -1;
          task.cost = (task.key_end - task.key_begin) * dims * (kLoadRows + task.num_rows());
          tasks.push_back(task);
        }
      }
    }
  }
}

namespace {

// Whether the memory of one head's keys is fragmented by other heads with the same pages.
bool is_fragmented(const AttentionParams& params) {
  if (params.page_table != nullptr && params.page_table_stride_h != 0) return false;
  if (params.k_stride.h < params.k_stride.s) return true;  // heads within tokens
  return params.page_table != nullptr &&
         params.page_size * params.k_stride.s * element_bytes(params.k_dtype) < kMinPieceBytes;
}

// Most rows of a bundle: so many that there are still bundles for all workers.
int64_t most_rows_of_bundle(const AttentionParams& params, const Schedule& schedule,
                            int64_t workers) {
  if (schedule.tile.packs || !is_fragmented(params)) return 0;
  int64_t rows = 0, runs = 0;  // of one group: what could be a task each
  const int32_t group = schedule.tasks[0].head_begin;
  for (const Task& task : schedule.tasks) {
    rows += task.num_rows();
    if (task.head_begin == group) {
      runs += std::max<int64_t>(1, (task.key_end - task.key_begin) / kMinSplitKeys);
    }
  }
  const int64_t per_run = workers == 1 ? 1 : div_up(workers * kTasksPerWorker, runs);
  return std::min(kMaxBundleRows, div_up(params.num_heads * params.q_len, per_run));
}

// Each task by itself, or with its neighbours of the same sequence and keys.
void make_bundles(int64_t most_rows, Schedule& schedule) {
  int64_t rows = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(schedule.tasks.size()); ++i) {
    const Task& task = schedule.tasks[i];
    const Task& before = schedule.tasks[i > 0 ? i - 1 : 0];
    rows += task.num_rows();
    if (i > 0 && rows <= most_rows && task.batch == before.batch &&
        task.key_begin == before.key_begin && task.key_end == before.key_end) {
      schedule.bundles.back().count += 1;
      schedule.bundles.back().cost += task.cost;
    } else {
      schedule.bundles.push_back({i, 1, task.cost});
      rows = task.num_rows();
    }
  }
}

// Split i of a task's keys; `first`: where split 0 begins.
Task split_of(const Task& task, int64_t i, int64_t first, int64_t split_keys, int64_t num_splits) {
  Task split = task;
  split.key_begin = std::max(task.key_begin, first + i * split_keys);
  split.key_end = std::min(first + (i + 1) * split_keys, task.key_end);
  split.cost = task.cost * (split.key_end - split.key_begin) / (task.key_end - task.key_begin);
  split.split = static_cast<int32_t>(i);
  split.num_splits = static_cast<int32_t>(num_splits);
  return split;
}

// Splits the keys of bundles that are longer than `target`.
void split_keys(const AttentionParams& params, int64_t target, Schedule& schedule) {
  std::vector<Task> tasks;
  std::vector<Bundle> bundles;
  for (const Bundle& bundle : schedule.bundles) {
    Task* const begin = schedule.tasks.data() + bundle.first;
    const int64_t keys = begin->key_end - begin->key_begin;
    const int64_t wanted = std::min(div_up(bundle.cost, target), keys / kMinSplitKeys);
    const int64_t segment = schedule.tile.segment_keys;
    const int64_t split_keys =
        segment > 0 ? segment
                    : div_up(div_up(keys, std::max<int64_t>(wanted, 1)), schedule.tile.keys) *
                          schedule.tile.keys;
    const int64_t first = segment > 0 ? begin->key_begin / segment * segment : begin->key_begin;
    const int64_t num_splits = wanted <= 1 ? 1 : div_up(begin->key_end - first, split_keys);
    if (num_splits > 1) {
      for (Task* task = begin; task < begin + bundle.count; ++task) {
        task->merge = schedule.num_merges++;
        task->partial = schedule.partial_floats;
        schedule.partial_floats += num_splits * task->num_rows() * partial_row_floats(params);
      }
    }
    for (int64_t i = 0; i < num_splits; ++i) {
      bundles.push_back({static_cast<int64_t>(tasks.size()), bundle.count, 0});
      for (const Task* task = begin; task < begin + bundle.count; ++task) {
        tasks.push_back(num_splits == 1 ? *task
                                        : split_of(*task, i, first, split_keys, num_splits));
        bundles.back().cost += tasks.back().cost;
      }
    }
  }
  schedule.tasks.swap(tasks);
  schedule.bundles.swap(bundles);
}

int64_t total_cost(const std::vector<Task>& tasks) {
  int64_t sum = 0;
  for (const Task& task : tasks) sum += task.cost;
  return sum;
}

int most_rows(const std::vector<Task>& tasks) {
  int rows = 0;
  for (const Task& task : tasks) rows = std::max(rows, task.num_rows());
  return rows;
}

}  // namespace

Schedule make_schedule(const AttentionParams& params, const MaskBlocks& masks, bool batch_invariant,
                       const TileLimits& limits, int num_threads) {
  Schedule schedule{};
  schedule.tile = tile_shape(params, limits);
  const std::vector<Group> groups = make_groups(params, schedule.heads, schedule.invalid_heads);
  if (params.q_len == 0) return schedule;

  const auto add_tasks = [&] {
    schedule.tasks.clear();
    add_row_blocks(params, masks, groups, schedule.heads, schedule.tile.rows, schedule.tasks);
    if (!batch_invariant) return;
    for (Task& task : schedule.tasks) {
      task.direct = false;
      task.key_begin -= task.key_begin % schedule.tile.keys;
    }
  };
  add_tasks();
  if (schedule.tasks.empty()) return schedule;  // no sequence, or no head whose map entry is valid
  const int64_t cost = total_cost(schedule.tasks);
  const int64_t workers =
      std::min<int64_t>(num_threads, std::max<int64_t>(1, cost / kMinCostPerWorker));
  while (workers > 1 && most_rows(schedule.tasks) > kMinTileRows &&
         static_cast<int64_t>(schedule.tasks.size()) < workers * kTasksPerWorker) {
    schedule.tile.rows = std::max(kMinTileRows, schedule.tile.rows / 2);
    add_tasks();
  }
  schedule.tile.rows = most_rows(schedule.tasks);
  schedule.tile.packs = batch_invariant || schedule.tile.rows > kMaxDirectRows;
  if (!schedule.tile.packs) schedule.tile.keys = direct_tile_keys(params);
  if (batch_invariant) schedule.tile.segment_keys = kSegmentKeys;
  make_bundles(most_rows_of_bundle(params, schedule, workers), schedule);
  if (workers > 1) split_keys(params, div_up(cost, workers * kTasksPerWorker), schedule);

  const auto longer = [](const Bundle& x, const Bundle& y) { return x.cost > y.cost; };
  if (!std::is_sorted(schedule.bundles.begin(), schedule.bundles.end(), longer)) {
    std::stable_sort(schedule.bundles.begin(), schedule.bundles.end(), longer);
  }
  schedule.num_workers =
      static_cast<int>(std::min<int64_t>(workers, static_cast<int64_t>(schedule.bundles.size())));
  return schedule;
}

}  // namespace gqa::cpu
