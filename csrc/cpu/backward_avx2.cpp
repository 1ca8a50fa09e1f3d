// The backward kernels for x86-64 with AVX2, FMA and F16C; see kernels_avx2.cpp.
#define GQA_ISA avx2

#include "../core/dropout.h"
#include "../core/visible.h"
#include "backward_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "backward_kernel.h"
#include "vec_avx2.h"

namespace gqa::cpu::avx2 {
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
}  // namespace gqa::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const BackwardKernels kAvx2Backward = {
    Isa::kAvx2,
    avx2::kScratchFloats,
    avx2::kSumWidths,
    {avx2::kRunTask[0], avx2::kRunTask[1], avx2::kRunTask[2]},
    {avx2::kStoreSums[0], avx2::kStoreSums[1], avx2::kStoreSums[2]},
};

}  // namespace gqa::cpu

#endif
