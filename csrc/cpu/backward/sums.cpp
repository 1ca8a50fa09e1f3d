#include "sums.h"

#include <utility>

namespace gqa::cpu {

void PartSums::start(const BackwardTask* parts, const SumWidths& widths) {
  parts_ = parts;
  widths_ = widths;
  waiting_.resize(parts->num_parts);
}

bool PartSums::add(const BackwardTask& part, AlignedFloats& sums) {
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_[part.part] = std::move(sums);
  if (busy_) return false;  // that thread checks again before it returns
  busy_ = true;
  while (next_ < part.num_parts && waiting_[next_].get() != nullptr) {
    const BackwardTask& next = parts_[next_];
    AlignedFloats next_sums = std::move(waiting_[next_++]);
    lock.unlock();
    if (next.part == 0) {
      total_ = std::move(next_sums);
    } else {
      add_to_total(next, next_sums.get());
      sums = std::move(next_sums);
    }
    lock.lock();
  }
  busy_ = false;
  return next_ == part.num_parts;
}

void PartSums::add_to_total(const BackwardTask& part, const float* sums) {
  const BackwardTask& first = parts_[0];
  const SumWidths widths = widths_.of(part);
  const int64_t offset = part.key_begin - first.key_begin, keys = part.key_end - part.key_begin;
  const auto add_rows = [=](const float* from, int64_t width, float* to) {
    for (int64_t i = 0; i < keys * width; ++i) to[offset * width + i] += from[i];
  };
  add_rows(sums, widths.dk, total_.get());
  add_rows(sums + sum_keys(part) * widths.dk, widths.dv,
           total_.get() + sum_keys(first) * widths.dk);
}

}  // namespace gqa::cpu
