// The bf16 kernels for x86-64 with AMX tiles; see kernels_avx2.cpp.
#define GQA_ISA amx
#define GQA_VEC_BF16

#include "../../core/dropout.h"
#include "../../core/visible.h"
#include "../forward/kernel_table.h"

#if defined(GQA_HAVE_AMX)

#include <cmath>
#include <cstring>
#include <deque>
#include <type_traits>

#include "intrinsics_avx512.h"

#if defined(GQA_EMULATE_AVX512)
// No instruction set to switch on.
#elif defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#endif

#include "../forward/kernel.h"
#include "../forward/engine_amx.h"
#include "../forward/products_pairs.h"
#include "../forward/products_amx.h"
#include "vec_avx512.h"

namespace gqa::cpu::amx {
namespace {

using Few = DirectProducts<Vec, BFloat16>;
using FewOnTiles = TileDirectProducts<Vec>;
using Many = PairProducts<Vec, TileEngine<Vec>>;

// Fewer rows take as many instructions without tiles, and their scores need not be transposed. All
// tasks of a call do the same, so that its results do not depend on how its tasks are bundled.
constexpr int kMinTileRows = 5;

void run_with_tiles(const CallState& call, const Bundle& bundle, float* scratch) {
  if (call.schedule.tile.rows < kMinTileRows) {
    return run_bundle<Vec, BFloat16, Few, Few>(call, bundle, scratch);
  }
  const TileScope tiles;
  run_bundle<Vec, BFloat16, FewOnTiles, Many>(call, bundle, scratch);
}

// Explicit instantiations, inside the switch.
constexpr BundleFunction kRunBundle = run_with_tiles;
constexpr auto kScratchFloats = scratch_floats<Vec, Many>;

}  // namespace
}  // namespace gqa::cpu::amx

#if defined(GQA_EMULATE_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace gqa::cpu {

const Kernels kAmxKernels = {
    Isa::kAmx,
    kAmxTiles,
    amx::kScratchFloats,
    {nullptr, amx::kRunBundle},
};

}  // namespace gqa::cpu

#endif
