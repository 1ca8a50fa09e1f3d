// Included ahead of every C++ file of a wheel. Binds functions of the C library that have newer
// versions to those of glibc 2.28 and older (manylinux_2_28), whatever the compiler's own glibc is.
// The versions differ in how they report errors through errno only.
#include <features.h>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define GQA_OLD_GLIBC "@GLIBC_2.2.5"
#else
#define GQA_OLD_GLIBC "@GLIBC_2.17"
#endif
__asm__(".symver exp,exp" GQA_OLD_GLIBC);
__asm__(".symver log,log" GQA_OLD_GLIBC);
__asm__(".symver pow,pow" GQA_OLD_GLIBC);
#undef GQA_OLD_GLIBC
#endif
