// The instruction set of files that include this: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#define GQA_ISA avx2
#define GQA_TARGET "avx2,fma,f16c"
#define GQA_VEC "vec_avx2.h"
