// The instruction set of files that include this: what every processor has.
#pragma once

#define GQA_ISA portable
#define GQA_VEC "vec_portable.h"
