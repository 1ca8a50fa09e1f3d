// The bf16 forward kernels for x86-64 with AVX-512 BF16.
#include "cpu_features.h"

#if defined(GQA_HAVE_AVX512_BF16)
#include "avx512_bf16.h"

#include "begin.h"

#include "../forward/engine_bf16.h"
#include "../forward/kernel.h"
#include "../forward/products_halves.h"
#include "../forward/products_pairs.h"

namespace gqa::cpu::avx512_bf16 {
namespace {

using Few = HalfProducts<Vec, BFloat16>;
using Many = PairProducts<Vec, DotProductEngine<Vec>>;

constexpr ByStorage<BundleFunction> kRunBundle = {nullptr,
                                                  run_bundle<Vec, BFloat16, BFloat16, Few, Many>};
constexpr auto kScratchFloats = scratch_floats<Vec, Many>;

}  // namespace
}  // namespace gqa::cpu::avx512_bf16

#include "end.h"

const gqa::cpu::ForwardKernels gqa::cpu::kAvx512Bf16Forward = {
    Isa::kAvx512Bf16, kLargeCacheTiles, avx512_bf16::kScratchFloats, avx512_bf16::kRunBundle};
#endif
