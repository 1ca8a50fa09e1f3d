// The instruction set of files that include this: NEON with products of bytes.
#pragma once

#include <arm_neon.h>

#define GQA_ISA neon_dot
#if defined(__clang__)
#define GQA_TARGET "dotprod"
#else
#define GQA_TARGET "arch=armv8.2-a+dotprod"
#endif
#define GQA_EXTENDS_NEON
#define GQA_VEC "vec_neon_dot.h"
