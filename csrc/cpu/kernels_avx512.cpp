// The kernels for x86-64 with AVX-512 F, BW, DQ and VL; see kernels_avx2.cpp.
#define GQA_ISA avx512

#include "../core/dropout.h"
#include "../core/visible.h"
#include "kernels.h"

#if defined(GQA_HAVE_AVX512)

#include <cmath>
#include <cstring>
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

#include "attention_kernel.h"
#include "vec_avx512.h"

namespace gqa::cpu::avx512 {
namespace {

// Explicit instantiations, inside the switch.
constexpr TaskFunction kRunTask[kNumDTypes] = {
    run_task<Vec, float>,      run_task<Vec, BFloat16>,
    run_task<Vec, Float16>,    nullptr,
    run_task<Vec, Float8E4M3>, run_task<Vec, Float8E5M2>,
    run_task<Vec, Int8>,       run_task<Vec, Int4Pair>,
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
    {avx512::kRunTask[0], avx512::kRunTask[1], avx512::kRunTask[2], avx512::kRunTask[3],
     avx512::kRunTask[4], avx512::kRunTask[5], avx512::kRunTask[6], avx512::kRunTask[7]},
};

}  // namespace gqa::cpu

#endif
