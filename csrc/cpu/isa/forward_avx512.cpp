// The kernels for x86-64 with AVX-512 F, BW, DQ and VL; see kernels_avx2.cpp.
#define GQA_ISA avx512

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../forward/kernel_table.h"

#if defined(GQA_HAVE_AVX512)

#include <cmath>
#include <cstring>
#include <deque>
#include <type_traits>

#include "intrinsics_avx512.h"

#if defined(GQA_EMULATE_AVX512)
// No instruction set to switch on.
#elif defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "../forward/kernel.h"
#include "vec_avx512.h"

namespace gqa::cpu::avx512 {
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
}  // namespace gqa::cpu::avx512

#if defined(GQA_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const Kernels kAvx512Kernels = {
    Isa::kAvx512,
    kLargeCacheTiles,
    avx512::kScratchFloats,
    {avx512::kRunBundle[0], avx512::kRunBundle[1], avx512::kRunBundle[2], avx512::kRunBundle[3],
     avx512::kRunBundle[4], avx512::kRunBundle[5], avx512::kRunBundle[6], avx512::kRunBundle[7]},
};

}  // namespace gqa::cpu

#endif
