// The backward kernels of one instruction set, for backward.cpp to choose from.
#pragma once

#include <array>
#include <cstdint>

#include "../../core/backward_params.h"
#include "../isa/cpu_features.h"
#include "schedule.h"
#include "sums.h"

namespace gqa::cpu {

// What the tasks of a call share.
struct BackwardState {
  const BackwardParams& params;
  const MaskBlocks& masks;
  const BackwardSchedule& schedule;
  float* slope_rows;       // [B, Hq, Sq] or nullptr: gradient of the slope by query
  float* sink_rows;        // [B, Hq, Sq] or nullptr: gradient of the sink by query
  int64_t first_sequence;  // in the forward call: what dropout counts from
};

// Writes dQ of one task's rows, and its sums of dK and dV. scratch has scratch_floats(...) floats.
using BackwardFunction = void (*)(const BackwardState& state, const BackwardTask& task,
                                  float* scratch, float* sums);
// Writes dK and dV of a KV head from the complete sums; zeros for keys that no query sees.
using StoreSumsFunction = void (*)(const BackwardParams& params, const BackwardTask& task,
                                   const float* sums);

struct BackwardKernels {
  Isa isa;
  int64_t (*scratch_floats)(const AttentionParams& params, const TileShape& tile);
  SumWidths (*sum_widths)(const AttentionParams& params);
  std::array<BackwardFunction, 3> run_task;  // by DType of q: fp32, bf16, fp16
  std::array<StoreSumsFunction, 3> store_sums;
};

extern const BackwardKernels kPortableBackward;
#if defined(__x86_64__)
extern const BackwardKernels kAvx2Backward;
#elif defined(__aarch64__)
extern const BackwardKernels kNeonBackward;
#endif
#if defined(GQA_HAVE_AVX512)
extern const BackwardKernels kAvx512Backward;
#endif

}  // namespace gqa::cpu
