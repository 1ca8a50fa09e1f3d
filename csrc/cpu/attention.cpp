#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "schedule.h"

namespace gqa::cpu {
namespace {

// Best first.
const Kernels* const kAllKernels[] = {
#if defined(__x86_64__)
    &kAvx2Kernels,
#endif
    &kPortableKernels,
};

// The best for this processor, or the one that GQA_KERNELS_CPU_ISA names. Read at every call: tests
// change it.
const Kernels& select_kernels() {
  const char* forced = std::getenv("GQA_KERNELS_CPU_ISA");
  std::string names;
  for (const Kernels* kernels : kAllKernels) {
    if (!kernels->supported()) continue;
    if (forced == nullptr || *forced == '\0' || std::strcmp(forced, kernels->name) == 0)
      return *kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("GQA_KERNELS_CPU_ISA must be one of " + names + ", got " + forced);
}

// Floats on cache lines of their own.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t n)
      : data_(static_cast<float*>(::operator new(n * sizeof(float), kAlignment))) {}
  ~AlignedFloats() { ::operator delete(data_, kAlignment); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* get() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

constexpr int64_t kFloatsPerLine = 16;

template <class T>
void fill_head(const AttentionParams& params, const Schedule& schedule, int32_t head, T value) {
  for (int64_t b = 0; b < schedule.q_batch; ++b) {
    for (int64_t t = 0; t < schedule.q_tokens; ++t) {
      T* out = static_cast<T*>(params.out) + b * params.out_stride.b + head * params.out_stride.h +
               t * params.out_stride.s;
      std::fill(out, out + params.value_head_dim, value);
    }
    float* lse = params.lse + (b * params.num_heads + head) * schedule.q_tokens;
    std::fill(lse, lse + schedule.q_tokens, std::numeric_limits<float>::quiet_NaN());
  }
}

// A head whose map entry names no KV head: NaN, so that it can't be overlooked.
void fill_head_with_nan(const AttentionParams& params, const Schedule& schedule, int32_t head) {
  switch (params.dtype) {
    case DType::kBFloat16: return fill_head(params, schedule, head, BFloat16{0x7fc0});
    case DType::kFloat16: return fill_head(params, schedule, head, Float16{0x7e00});
    default: return fill_head(params, schedule, head, std::numeric_limits<float>::quiet_NaN());
  }
}

// Workers take the next task until none is left: tasks differ in length, and so do threads in
// speed.
struct Work {
  const CallState& call;
  TaskFunction run_task;
  float* scratch;
  int64_t scratch_stride;  // floats per worker
  std::atomic<size_t> next{0};

  void run_worker(int64_t worker) {
    const std::vector<Task>& tasks = call.schedule.tasks;
    for (size_t i = next.fetch_add(1); i < tasks.size(); i = next.fetch_add(1)) {
      run_task(call, tasks[i], scratch + worker * scratch_stride);
    }
  }
};

}  // namespace

const char* instruction_set() { return select_kernels().name; }

void attention_forward(const AttentionParams& params, const ThreadPool& pool) {
  const Kernels& kernels = select_kernels();
  const Schedule schedule = make_schedule(params, pool.num_threads);
  for (const int32_t head : schedule.invalid_heads) fill_head_with_nan(params, schedule, head);
  if (schedule.tasks.empty()) return;

  AlignedFloats partials(schedule.partial_floats);
  const auto unfinished = std::make_unique<std::atomic<int32_t>[]>(schedule.num_merges);
  for (const Task& task : schedule.tasks) {
    if (task.merge >= 0) unfinished[task.merge].store(task.num_splits, std::memory_order_relaxed);
  }
  const int64_t lines = kernels.scratch_floats(params, schedule.tile) / kFloatsPerLine + 1;
  AlignedFloats scratch(schedule.num_workers * lines * kFloatsPerLine);

  const CallState call{params, schedule, partials.get(), unfinished.get()};
  Work work{call, kernels.run_task[static_cast<int>(params.k_dtype)], scratch.get(),
            lines * kFloatsPerLine};
  pool.run(
      schedule.num_workers,
      [](void* context, int64_t worker) { static_cast<Work*>(context)->run_worker(worker); },
      &work);
}

}  // namespace gqa::cpu
