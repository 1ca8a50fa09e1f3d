// Every kernel header is compiled once per instruction set, inside the namespace GQA_ISA names, so
// that the linker can never take code for one processor where another was meant. The .cpp file
// defines GQA_ISA before its includes.
#pragma once

#ifndef GQA_ISA
#error "define GQA_ISA (the namespace of the instruction set) before including the CPU kernels"
#endif

#define GQA_INLINE inline __attribute__((always_inline))
#define GQA_NOINLINE __attribute__((noinline))

#define GQA_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define GQA_UNROLL(n) GQA_PRAGMA(clang loop unroll(full))
#else
#define GQA_UNROLL(n) GQA_PRAGMA(GCC unroll n)
#endif
