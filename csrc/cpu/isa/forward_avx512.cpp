// The forward kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#include "cpu_features.h"

#if defined(GQA_HAVE_AVX512)
#include "avx512.h"

#include "instantiate_forward.h"

const gqa::cpu::ForwardKernels gqa::cpu::kAvx512Forward = {
    Isa::kAvx512, kLargeCacheTiles, avx512::kScratchFloats, avx512::kRunBundle};
#endif
