// Switches on the instruction set that the including file has chosen (avx2.h, ...), up to end.h. It
// is switched on here and not by compiler flags, so that all files are built alike. Everything that
// other files share with such a file is included before the switch: the linker keeps one copy of
// shared functions, and it must run on every processor.
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../backward/kernel_table.h"
#include "../forward/kernel_table.h"
#include "isa.h"

#if !defined(GQA_TARGET)
// The compiler's default.
#elif defined(__clang__)
GQA_PRAGMA(clang attribute push(__attribute__((target(GQA_TARGET))), apply_to = function))
#else
GQA_PRAGMA(GCC push_options)
GQA_PRAGMA(GCC target(GQA_TARGET))
#endif

#include GQA_VEC
