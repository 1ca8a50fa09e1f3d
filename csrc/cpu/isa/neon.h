// The instruction set of files that include this: what every aarch64 processor has.
#pragma once

#include <arm_neon.h>

#define GQA_ISA neon
#define GQA_VEC "vec_neon.h"
