// The backward kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include "cpu_features.h"

#if defined(GQA_HAVE_AVX512)
#include "avx512.h"

#include "instantiate_backward.h"

const gqa::cpu::BackwardKernels gqa::cpu::kAvx512Backward = {
    Isa::kAvx512, avx512::kScratchFloats, avx512::kSumWidths, avx512::kRunTask, avx512::kStoreSums};
#endif
