// The kernels for any processor.
#define GQA_ISA portable

#include "../forward/kernel.h"
#include "vec_portable.h"

namespace gqa::cpu {

const Kernels kPortableKernels = {
    Isa::kPortable,
    kSmallCacheTiles,
    portable::scratch_floats<portable::Vec>,
    {
        portable::run_bundle<portable::Vec, float>,
        portable::run_bundle<portable::Vec, BFloat16>,
        portable::run_bundle<portable::Vec, Float16>,
        nullptr,
        portable::run_bundle<portable::Vec, Float8E4M3>,
        portable::run_bundle<portable::Vec, Float8E5M2>,
        portable::run_bundle<portable::Vec, Int8>,
        portable::run_bundle<portable::Vec, Int4Pair>,
    },
};

}  // namespace gqa::cpu
