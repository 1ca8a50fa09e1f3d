// The AVX-512 and AMX intrinsics: the compiler's own or, under GQA_EMULATE_AVX512, functions of the
// same names in this namespace that compute on any processor what Intel's manual says.
#pragma once

#include "isa.h"

#if defined(GQA_EMULATE_AVX512)
#include "emulated_avx512.h"
#include "emulated_int16.h"
#define GQA_PIN(x) static_cast<void>(x)
#else
#if defined(__GNUC__) && !defined(__clang__)
// Operands that gcc's header leaves undefined on purpose (gcc bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define GQA_PIN(x) __asm__("" : "+v"(x))
#endif
