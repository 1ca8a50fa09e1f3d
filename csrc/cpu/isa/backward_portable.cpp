// The backward kernels for any processor.
#include "portable.h"

#include "instantiate_backward.h"

const gqa::cpu::BackwardKernels gqa::cpu::kPortableBackward = {
    Isa::kPortable, portable::kScratchFloats, portable::kSumWidths, portable::kRunTask,
    portable::kStoreSums};
