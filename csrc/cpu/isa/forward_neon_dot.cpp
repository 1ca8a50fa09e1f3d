// The int8 and int4 forward kernels for aarch64 with SDOT.
#include "cpu_features.h"

#if defined(__aarch64__)
#include "neon_dot.h"

#include "begin.h"

#include "../forward/kernel.h"

namespace gqa::cpu::neon_dot {
namespace {

constexpr ByStorage<BundleFunction> kRunBundle = {
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    run_bundle<Vec, Int8>,
    run_bundle<Vec, Int4Pair>,
    run_bundle<Vec, Int8, Int4Pair>,
};
constexpr auto kScratchFloats = scratch_floats<Vec>;

}  // namespace
}  // namespace gqa::cpu::neon_dot

#include "end.h"

const gqa::cpu::ForwardKernels gqa::cpu::kNeonDotForward = {
    Isa::kNeonDot, kSmallCacheTiles, neon_dot::kScratchFloats, neon_dot::kRunBundle};
#endif
