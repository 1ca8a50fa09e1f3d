// The fp16 forward kernels for aarch64 with FMLAL.
#include "cpu_features.h"

#if defined(__aarch64__)
#include "neon_fhm.h"

#include "begin.h"

#include "../forward/kernel.h"
#include "../forward/products_halves.h"

namespace gqa::cpu::neon_fhm {
namespace {

constexpr ByStorage<BundleFunction> kRunBundle = {
    nullptr,
    nullptr,
    run_bundle<Vec, Float16, Float16, HalfProducts<Vec, Float16>>,
};
constexpr auto kScratchFloats = scratch_floats<Vec>;

}  // namespace
}  // namespace gqa::cpu::neon_fhm

#include "end.h"

const gqa::cpu::ForwardKernels gqa::cpu::kNeonFhmForward = {
    Isa::kNeonFhm, kSmallCacheTiles, neon_fhm::kScratchFloats, neon_fhm::kRunBundle};
#endif
