// The backward kernels for aarch64.
#include "cpu_features.h"

#if defined(__aarch64__)
#include "neon.h"

#include "instantiate_backward.h"

const gqa::cpu::BackwardKernels gqa::cpu::kNeonBackward = {
    Isa::kNeon, neon::kScratchFloats, neon::kSumWidths, neon::kRunTask, neon::kStoreSums};
#endif
