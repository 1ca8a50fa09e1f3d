// What one instruction set offers to attention.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "../../core/params.h"
#include "../aligned.h"
#include "../isa/cpu_features.h"
#include "schedule.h"

namespace gqa::cpu {

// What the tasks of a call share.
struct CallState {
  const AttentionParams& params;
  const Schedule& schedule;
  float* partials;                   // [schedule.partial_floats]
  std::atomic<int32_t>* unfinished;  // [schedule.num_merges] splits still at work
  bool lse_wanted;
  bool cheap_subnormals;
};

// Runs the tasks of one bundle with scratch_floats(...) floats of memory of its own.
using BundleFunction = void (*)(const CallState& call, const Bundle& bundle, float* scratch);

struct Kernels {
  Isa isa;
  TileLimits limits;
  int64_t (*scratch_floats)(const AttentionParams& params, const Schedule& schedule,
                            const Bundle& bundle);
  // By DType of K and V. nullptr: this instruction set has nothing better than the one below it.
  BundleFunction run_bundle[kNumDTypes];
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
#endif
#if defined(GQA_HAVE_AVX512)
extern const Kernels kAvx512Kernels;
#endif
#if defined(GQA_HAVE_AVX512_BF16)
extern const Kernels kAvx512Bf16Kernels;
#endif
#if defined(GQA_HAVE_AMX)
extern const Kernels kAmxKernels;
#endif

}  // namespace gqa::cpu
