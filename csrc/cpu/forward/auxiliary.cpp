#include "auxiliary.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../core/visible.h"

namespace gqa::cpu {
namespace {

int64_t whole_lines(int64_t floats) {
  return (floats + kFloatsPerLine - 1) / kFloatsPerLine * kFloatsPerLine;
}

int64_t score_floats(const ScoredRows& rows, const Task& task) {
  return (task.num_rows() - rows.first) * rows.row_floats;
}

// For the scores of tasks with splits. The thread that calls keeps it: in decode, the page faults of
// new memory would cost as much as the rest of this work.
thread_local AlignedFloats kept_memory;
constexpr int64_t kMostKeptFloats = 4 << 20;

}  // namespace

AuxiliaryWork::AuxiliaryWork(const AttentionParams& params, const Schedule& schedule,
                             const Auxiliary& wanted)
    : params_(params), wanted_(wanted) {
  if (wanted.max_scores != nullptr) {
    const int64_t batch = params.q_offsets == nullptr ? params.batch : 1;
    row_max_ = AlignedFloats(batch * params.num_heads * params.q_tokens);
  }
  if (wanted.key_scores == nullptr || wanted.queries <= 0) return;
  const int64_t first_token = params.q_len - wanted.queries;
  for (const Task& task : schedule.tasks) {
    const int64_t tokens = std::max<int64_t>(0, first_token - task.token_begin);
    const int64_t first = std::min<int64_t>(tokens * task.num_heads(), task.num_rows());
    rows_.push_back(
        {static_cast<int>(first), task.key_begin, task.key_end, 0, nullptr, 0, nullptr});
  }
  place_scores(schedule);
  place_sums(schedule);
}

void AuxiliaryWork::place_scores(const Schedule& schedule) {
  const std::vector<Task>& tasks = schedule.tasks;
  // A task with splits is known by its merge.
  std::vector<KeyRange> keys(schedule.num_merges, KeyRange{INT64_MAX, 0});
  for (const Task& task : tasks) {
    if (task.merge < 0) continue;
    KeyRange& all = keys[task.merge];
    all = {std::min(all.begin, task.key_begin), std::max(all.end, task.key_end)};
  }
  std::vector<int64_t> place(schedule.num_merges, -1);
  int64_t floats = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    ScoredRows& rows = rows_[i];
    const int32_t merge = tasks[i].merge;
    if (merge >= 0) {
      rows.key_begin = keys[merge].begin;
      rows.key_end = keys[merge].end;
    }
    rows.row_floats = whole_lines(rows.key_end - rows.key_begin);
    if (merge >= 0 && place[merge] < 0) {
      place[merge] = floats;
      floats += score_floats(rows, tasks[i]);
    }
  }
  kept_memory.reserve(floats);
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (tasks[i].merge >= 0) rows_[i].scores = kept_memory.get() + place[tasks[i].merge];
  }
  for (const Bundle& bundle : schedule.bundles) {
    int64_t used = 0;
    for (int64_t i = bundle.first; i < bundle.first + bundle.count; ++i) {
      if (tasks[i].merge >= 0) continue;
      rows_[i].place = used;
      used += score_floats(rows_[i], tasks[i]);
    }
    worker_floats_ = std::max(worker_floats_, used);
  }
}

void AuxiliaryWork::place_sums(const Schedule& schedule) {
  const std::vector<Task>& tasks = schedule.tasks;
  const auto result_of = [&](size_t i) {
    return wanted_.key_scores +
           (static_cast<int64_t>(tasks[i].batch) * params_.num_k_heads + tasks[i].k_head) *
               params_.kv_len +
           rows_[i].key_begin;
  };
  std::vector<bool> taken(params_.batch * params_.num_k_heads);
  std::vector<float*> of_merge(schedule.num_merges, nullptr);
  std::vector<size_t> others;  // tasks whose sums are added to the result at the end
  int64_t floats = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task& task = tasks[i];
    ScoredRows& rows = rows_[i];
    if (rows.first == task.num_rows() || rows.key_begin >= rows.key_end || task.split > 0) continue;
    const size_t head = static_cast<size_t>(task.batch) * params_.num_k_heads + task.k_head;
    if (!taken[head]) {
      taken[head] = true;
      rows.sums = result_of(i);
    } else {
      others.push_back(i);
      floats += rows.row_floats;
    }
  }
  sums_ = AlignedFloats(floats);
  float* next = sums_.get();
  for (const size_t i : others) {
    ScoredRows& rows = rows_[i];
    rows.sums = next;
    next += rows.row_floats;
    additions_.push_back({rows.sums, result_of(i), rows.key_end - rows.key_begin});
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (tasks[i].merge >= 0 && tasks[i].split == 0) of_merge[tasks[i].merge] = rows_[i].sums;
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (tasks[i].merge >= 0) rows_[i].sums = of_merge[tasks[i].merge];
  }
}

void AuxiliaryWork::finish(const Schedule& schedule) const {
  if (kept_memory.size() > kMostKeptFloats) kept_memory = AlignedFloats();
  for (const Addition& addition : additions_) {
    for (int64_t j = 0; j < addition.n; ++j) addition.to[j] += addition.from[j];
  }
  if (wanted_.max_scores == nullptr) return;
  std::vector<bool> valid(params_.num_heads, true);
  for (const int32_t head : schedule.invalid_heads) valid[head] = false;
  for (int64_t b = 0; b < params_.batch; ++b) {
    const Queries queries = queries_of(params_, b);
    for (int64_t h = 0; h < params_.num_heads; ++h) {
      const float* row =
          row_max_.get() + (queries.b * params_.num_heads + h) * params_.q_tokens + queries.first;
      float most = -INFINITY;
      for (int64_t t = 0; t < queries.count; ++t) {
        if (!(row[t] <= most)) most = row[t];  // a NaN stays: it compares with nothing
        if (std::isnan(most)) break;
      }
      wanted_.max_scores[b * params_.num_heads + h] =
          valid[h] ? most : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

}  // namespace gqa::cpu
