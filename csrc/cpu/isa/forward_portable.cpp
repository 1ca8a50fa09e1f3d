// The forward kernels for any processor.
#include "portable.h"

#include "instantiate_forward.h"

const gqa::cpu::ForwardKernels gqa::cpu::kPortableForward = {
    Isa::kPortable, kSmallCacheTiles, portable::kScratchFloats, portable::kRunBundle};
