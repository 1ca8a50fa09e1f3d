// The forward kernels of one instruction set, for attention.cpp to choose from.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "../../core/params.h"
#include "../aligned.h"
#include "../isa/cpu_features.h"
#include "../mask_blocks.h"
#include "auxiliary.h"
#include "schedule.h"

namespace gqa::cpu {

// What the tasks of a call share.
struct CallState {
  const AttentionParams& params;
  const MaskBlocks& masks;
  const Schedule& schedule;
  float* partials;                   // [schedule.partial_floats]
  std::atomic<int32_t>* unfinished;  // [schedule.num_merges] splits that have not finished
  const AuxiliaryWork& auxiliary;
  int64_t scratch_floats;  // of a worker, before its memory for the auxiliary work
  bool lse_wanted;
};

// Runs the tasks of one bundle. scratch has scratch_floats(...) floats.
using BundleFunction = void (*)(const CallState& call, const Bundle& bundle, float* scratch);

// How K and V are stored: in the one type of both, whose number this is, or as int8 keys with int4
// values.
constexpr int kInt8Int4 = kNumDTypes;
inline int storage_of(DType k, DType v) {
  return k == DType::kInt8 && v == DType::kInt4 ? kInt8Int4 : static_cast<int>(k);
}
template <class T>
using ByStorage = std::array<T, kNumDTypes + 1>;

struct ForwardKernels {
  Isa isa;
  TileLimits limits;
  int64_t (*scratch_floats)(const AttentionParams& params, const Schedule& schedule,
                            const Bundle& bundle);
  // nullptr: for this storage of K and V, use the kernels of the next set in the list.
  ByStorage<BundleFunction> run_bundle;
};

extern const ForwardKernels kPortableForward;
#if defined(__x86_64__)
extern const ForwardKernels kAvx2Forward;
#elif defined(__aarch64__)
extern const ForwardKernels kNeonForward;
extern const ForwardKernels kNeonDotForward;
extern const ForwardKernels kNeonFhmForward;
extern const ForwardKernels kNeonBf16Forward;
#endif
#if defined(GQA_HAVE_AVX512)
extern const ForwardKernels kAvx512Forward;
#endif
#if defined(GQA_HAVE_AVX512_BF16)
extern const ForwardKernels kAvx512Bf16Forward;
#endif
#if defined(GQA_HAVE_AMX)
extern const ForwardKernels kAmxForward;
#endif

}  // namespace gqa::cpu
