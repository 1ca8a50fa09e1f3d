// The fp32 sums of dK and dV: their memory layout, and how the parts of a KV head are added up.
//
// Parts are added in their order, whatever order they finish in, so that every run computes the
// same bits. A thread that finishes a part hands in its sums, and then adds the parts that are next
// in order to part 0. Besides part 0, only parts that finished before an earlier one are kept.
// Memory is allocated when a task starts, so about one task's sums per thread exist at once.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "../aligned.h"
#include "schedule.h"

namespace gqa::cpu {

// The floats that the sums of one key need; 0 for a gradient that another task sums.
struct SumWidths {
  int64_t dk, dv;

  SumWidths of(const BackwardTask& task) const {
    return {task.k_head >= 0 ? dk : 0, task.v_head >= 0 ? dv : 0};
  }
};

// Sums of dK [sum_keys, widths.dk], then of dV [sum_keys, widths.dv], from key task.key_begin on: a
// few keys more than the task has, since the kernels write whole strips of rows.
inline int64_t sum_keys(const BackwardTask& task) { return task.key_end - task.key_begin + 8; }

inline int64_t sum_floats(const BackwardTask& task, const SumWidths& widths) {
  const SumWidths own = widths.of(task);
  return sum_keys(task) * (own.dk + own.dv);
}

// The parts of one KV head.
class PartSums {
 public:
  // parts: the head's tasks in order. The keys of part 0 include those of all parts.
  void start(const BackwardTask* parts, const SumWidths& widths);

  // Takes the sums of a part, in memory from AlignedFloats::reserve, and leaves memory for the
  // caller's next task if any is free. Returns true once, when all parts are added: the sums of the
  // KV head are then in total(), laid out as part 0's.
  bool add(const BackwardTask& part, AlignedFloats& sums);

  AlignedFloats& total() { return total_; }

 private:
  void add_to_total(const BackwardTask& part, const float* sums);

  const BackwardTask* parts_ = nullptr;
  SumWidths widths_{};
  std::mutex mutex_;                    // of the three below
  std::vector<AlignedFloats> waiting_;  // by part: handed in, not yet added
  int32_t next_ = 0;                    // first part that is not added
  bool busy_ = false;                   // whether some thread is adding: total_ is its own
  AlignedFloats total_;
};

}  // namespace gqa::cpu
