// The backward kernels for x86-64 with AVX2, FMA and F16C.
#include "cpu_features.h"

#if defined(__x86_64__)
#include "avx2.h"

#include "instantiate_backward.h"

const gqa::cpu::BackwardKernels gqa::cpu::kAvx2Backward = {
    Isa::kAvx2, avx2::kScratchFloats, avx2::kSumWidths, avx2::kRunTask, avx2::kStoreSums};
#endif
