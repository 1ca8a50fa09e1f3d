// The instruction set of files that include this: AVX-512 with BF16 and AMX tiles.
#pragma once

#define GQA_ISA amx
#if !defined(GQA_EMULATE_AVX512)
#define GQA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16"
#endif
#define GQA_VEC "vec_avx512.h"
#define GQA_VEC_BF16

#include "intrinsics_avx512.h"
