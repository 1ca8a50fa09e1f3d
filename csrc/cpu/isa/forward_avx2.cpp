// The forward kernels for x86-64 with AVX2, FMA and F16C.
#include "cpu_features.h"

#if defined(__x86_64__)
#include "avx2.h"

#include "instantiate_forward.h"

const gqa::cpu::ForwardKernels gqa::cpu::kAvx2Forward = {Isa::kAvx2, kSmallCacheTiles,
                                                         avx2::kScratchFloats, avx2::kRunBundle};
#endif
