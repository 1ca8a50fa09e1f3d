// The backward kernels for x86-64 with AVX-512 F, BW, DQ and VL; see kernels_avx2.cpp.
#define GQA_ISA avx512

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../backward/kernel_table.h"

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

#include "../backward/kernel.h"
#include "vec_avx512.h"

namespace gqa::cpu::avx512 {
namespace {

// Explicit instantiations, inside the switch.
constexpr BackwardFunction kRunTask[3] = {run_backward_task<Vec, float>,
                                          run_backward_task<Vec, BFloat16>,
                                          run_backward_task<Vec, Float16>};
constexpr StoreSumsFunction kStoreSums[3] = {store_backward_sums<Vec, float>,
                                             store_backward_sums<Vec, BFloat16>,
                                             store_backward_sums<Vec, Float16>};
constexpr auto kScratchFloats = backward_scratch_floats<Vec>;
constexpr auto kSumWidths = backward_sum_widths<Vec>;

}  // namespace
}  // namespace gqa::cpu::avx512

#if defined(GQA_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const BackwardKernels kAvx512Backward = {
    Isa::kAvx512,
    avx512::kScratchFloats,
    avx512::kSumWidths,
    {avx512::kRunTask[0], avx512::kRunTask[1], avx512::kRunTask[2]},
    {avx512::kStoreSums[0], avx512::kStoreSums[1], avx512::kStoreSums[2]},
};

}  // namespace gqa::cpu

#endif
