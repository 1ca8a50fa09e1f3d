// Every kernel header is compiled once per instruction set, in a namespace that GQA_ISA names. So
// the linker can never confuse code for one processor with code for another. The .cpp file defines
// GQA_ISA before its includes (avx2.h, ...).
#pragma once

#ifndef GQA_ISA
#error "define GQA_ISA (the namespace of the instruction set) before including the CPU kernels"
#endif

#define GQA_INLINE inline __attribute__((always_inline))
#define GQA_NOINLINE __attribute__((noinline))

// With macros in its text replaced.
#define GQA_PRAGMA(...) GQA_PRAGMA_TEXT(__VA_ARGS__)
#define GQA_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define GQA_UNROLL(n) GQA_PRAGMA(clang loop unroll(full))
#else
#define GQA_UNROLL(n) GQA_PRAGMA(GCC unroll n)
#endif
