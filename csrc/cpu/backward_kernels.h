// What one instruction set offers to backward.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "../core/backward_params.h"
#include "backward_schedule.h"
#include "cpu_features.h"

namespace gqa::cpu {

// What the tasks of a call share.
struct BackwardState {
  const BackwardParams& params;
  const BackwardSchedule& schedule;
  float* part_sums;                  // [schedule.part_keys, sum_floats]
  std::atomic<int32_t>* unfinished;  // [schedule.num_merges] parts still at work
  float* slope_rows;                 // [B, Hq, Sq] or nullptr: gradient of the slope by query
  float* sink_rows;                  // [B, Hq, Sq] or nullptr: gradient of the sink by query
};

// Runs one task with scratch_floats(...) floats and schedule.worker_keys sums of its own.
using BackwardFunction = void (*)(const BackwardState& state, const BackwardTask& task,
                                  float* scratch, float* worker_sums);

struct BackwardKernels {
  Isa isa;
  int64_t (*scratch_floats)(const AttentionParams& params, const TileShape& tile);
  int64_t (*sum_floats)(const AttentionParams& params);  // of dK and dV of one key
  BackwardFunction run_task[3];                          // by DType of q: fp32, bf16, fp16
};

extern const BackwardKernels kPortableBackward;
#if defined(__x86_64__)
extern const BackwardKernels kAvx2Backward;
#endif
#if defined(GQA_HAVE_AVX512)
extern const BackwardKernels kAvx512Backward;
#endif

}  // namespace gqa::cpu
