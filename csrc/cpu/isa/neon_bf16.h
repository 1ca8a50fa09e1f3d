// The instruction set of files that include this: NEON with products of bf16 and matrices of bytes.
#pragma once

#include <arm_neon.h>

#define GQA_ISA neon_bf16
#if defined(__clang__)
#define GQA_TARGET "dotprod,i8mm,bf16"
#else
#define GQA_TARGET "arch=armv8.2-a+dotprod+i8mm+bf16"
#endif
#define GQA_EXTENDS_NEON
#define GQA_VEC "vec_neon_bf16.h"
