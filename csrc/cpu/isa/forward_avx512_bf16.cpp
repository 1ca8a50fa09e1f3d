// The bf16 kernels for x86-64 with AVX-512 BF16; see kernels_avx2.cpp.
#define GQA_ISA avx512_bf16
#define GQA_VEC_BF16

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../forward/kernel_table.h"

#if defined(GQA_HAVE_AVX512_BF16)

#include <cmath>
#include <cstring>
#include <deque>
#include <type_traits>

#include "intrinsics_avx512.h"

#if defined(GQA_EMULATE_AVX512)
// No instruction set to switch on.
#elif defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif

#include "../forward/kernel.h"
#include "../forward/engine_bf16.h"
#include "../forward/products_pairs.h"
#include "vec_avx512.h"

namespace gqa::cpu::avx512_bf16 {
namespace {

using Few = DirectProducts<Vec, BFloat16>;
using Many = PairProducts<Vec, DotProductEngine<Vec>>;

// Explicit instantiations, inside the switch.
constexpr BundleFunction kRunBundle = run_bundle<Vec, BFloat16, Few, Many>;
constexpr auto kScratchFloats = scratch_floats<Vec, Many>;

}  // namespace
}  // namespace gqa::cpu::avx512_bf16

#if defined(GQA_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const Kernels kAvx512Bf16Kernels = {
    Isa::kAvx512Bf16,
    kLargeCacheTiles,
    avx512_bf16::kScratchFloats,
    {nullptr, avx512_bf16::kRunBundle},
};

}  // namespace gqa::cpu

#endif
