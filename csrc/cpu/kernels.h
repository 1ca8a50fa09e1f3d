// What one instruction set offers to attention.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "../core/params.h"
#include "schedule.h"

namespace gqa::cpu {

// What the tasks of a call share.
struct CallState {
  const AttentionParams& params;
  const Schedule& schedule;
  float* partials;                   // [schedule.partial_floats]
  std::atomic<int32_t>* unfinished;  // [schedule.num_merges] splits still at work
};

// Runs one task with scratch_floats(...) floats of memory of its own.
using TaskFunction = void (*)(const CallState& call, const Task& task, float* scratch);

struct Kernels {
  const char* name;
  bool (*supported)();  // by this processor
  int64_t (*scratch_floats)(const AttentionParams& params, const TileShape& tile);
  TaskFunction run_task[kNumDTypes];  // by DType of K and V
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
#endif

}  // namespace gqa::cpu
