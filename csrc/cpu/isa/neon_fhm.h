// The instruction set of files that include this: NEON with products of fp16 that are added to fp32.
#pragma once

#include <arm_neon.h>

#define GQA_ISA neon_fhm
#if defined(__clang__)
#define GQA_TARGET "fullfp16,fp16fml"
#else
#define GQA_TARGET "arch=armv8.2-a+fp16fml"
#endif
#define GQA_EXTENDS_NEON
#define GQA_VEC "vec_neon_fhm.h"
