// The kernels for x86-64 with AVX2, FMA and F16C. The instruction set is switched on here and not
// by a compiler flag, so that all files are built alike; what other files share with this one is
// included before the switch.
#define GQA_ISA avx2

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../forward/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../forward/kernel.h"
#include "vec_avx2.h"

namespace gqa::cpu::avx2 {
namespace {

// Explicit instantiations, inside the switch.
constexpr BundleFunction kRunBundle[kNumDTypes] = {
    run_bundle<Vec, float>,      run_bundle<Vec, BFloat16>,
    run_bundle<Vec, Float16>,    nullptr,
    run_bundle<Vec, Float8E4M3>, run_bundle<Vec, Float8E5M2>,
    run_bundle<Vec, Int8>,       run_bundle<Vec, Int4Pair>,
};
constexpr auto kScratchFloats = scratch_floats<Vec>;

}  // namespace
}  // namespace gqa::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const Kernels kAvx2Kernels = {
    Isa::kAvx2,
    kSmallCacheTiles,
    avx2::kScratchFloats,
    {avx2::kRunBundle[0], avx2::kRunBundle[1], avx2::kRunBundle[2], avx2::kRunBundle[3],
     avx2::kRunBundle[4], avx2::kRunBundle[5], avx2::kRunBundle[6], avx2::kRunBundle[7]},
};

}  // namespace gqa::cpu

#endif
