// The instruction set of files that include this: AVX-512 F, BW, DQ and VL.
#pragma once

#define GQA_ISA avx512
#if !defined(GQA_EMULATE_AVX512)
#define GQA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#endif
#define GQA_VEC "vec_avx512.h"

#include "intrinsics_avx512.h"
