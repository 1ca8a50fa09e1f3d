// Ends what begin.h began.
#if !defined(GQA_TARGET)
#elif defined(__clang__)
GQA_PRAGMA(clang attribute pop)
#else
GQA_PRAGMA(GCC pop_options)
#endif
