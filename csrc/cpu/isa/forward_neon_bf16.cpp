// The bf16, int8 and int4 forward kernels for aarch64 with BFDOT, BFMMLA and SMMLA.
#include "cpu_features.h"

#if defined(__aarch64__)
#include "neon_bf16.h"

#include "begin.h"

#include "../forward/kernel.h"
#include "../forward/products_halves.h"
#include "../forward/products_matrices.h"

namespace gqa::cpu::neon_bf16 {
namespace {

using Few = HalfProducts<Vec, BFloat16>;
using Many = MatrixProducts<Vec>;

constexpr ByStorage<BundleFunction> kRunBundle = {
    nullptr,
    run_bundle<Vec, BFloat16, BFloat16, Few, Many>,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    run_bundle<Vec, Int8>,
    run_bundle<Vec, Int4Pair>,
    run_bundle<Vec, Int8, Int4Pair>,
};
// Rows are padded differently by the products of bf16 and those of int8 and int4.
int64_t most_scratch_floats(const AttentionParams& params, const Schedule& schedule,
                            const Bundle& bundle) {
  const int64_t bf16 = scratch_floats<Vec, Many>(params, schedule, bundle);
  const int64_t integers = scratch_floats<Vec>(params, schedule, bundle);
  return bf16 > integers ? bf16 : integers;
}

}  // namespace
}  // namespace gqa::cpu::neon_bf16

#include "end.h"

const gqa::cpu::ForwardKernels gqa::cpu::kNeonBf16Forward = {
    Isa::kNeonBf16, kSmallCacheTiles, neon_bf16::most_scratch_floats, neon_bf16::kRunBundle};
#endif
