// The forward kernels for aarch64.
#include "cpu_features.h"

#if defined(__aarch64__)
#include "neon.h"

#include "instantiate_forward.h"

const gqa::cpu::ForwardKernels gqa::cpu::kNeonForward = {Isa::kNeon, kSmallCacheTiles,
                                                         neon::kScratchFloats, neon::kRunBundle};
#endif
