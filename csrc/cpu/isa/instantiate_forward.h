// The forward kernels on the instruction set that the including file has chosen, for every storage
// of K and V: kRunBundle and kScratchFloats in its namespace. The constants instantiate the templates
// here, while the instruction set is switched on.
#include "begin.h"

#include "../forward/kernel.h"

namespace gqa::cpu::GQA_ISA {
namespace {

constexpr ByStorage<BundleFunction> kRunBundle = {
    run_bundle<Vec, float>,          run_bundle<Vec, BFloat16>,
    run_bundle<Vec, Float16>,        nullptr,
    run_bundle<Vec, Float8E4M3>,     run_bundle<Vec, Float8E5M2>,
    run_bundle<Vec, Int8>,           run_bundle<Vec, Int4Pair>,
    run_bundle<Vec, Int8, Int4Pair>,
};
constexpr auto kScratchFloats = scratch_floats<Vec>;

}  // namespace
}  // namespace gqa::cpu::GQA_ISA

#include "end.h"
