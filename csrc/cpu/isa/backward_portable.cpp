// The backward kernels for any processor.
#define GQA_ISA portable

#include "../backward/kernel.h"
#include "vec_portable.h"

namespace gqa::cpu {

const BackwardKernels kPortableBackward = {
    Isa::kPortable,
    portable::backward_scratch_floats<portable::Vec>,
    portable::backward_sum_widths<portable::Vec>,
    {portable::run_backward_task<portable::Vec, float>,
     portable::run_backward_task<portable::Vec, BFloat16>,
     portable::run_backward_task<portable::Vec, Float16>},
    {portable::store_backward_sums<portable::Vec, float>,
     portable::store_backward_sums<portable::Vec, BFloat16>,
     portable::store_backward_sums<portable::Vec, Float16>},
};

}  // namespace gqa::cpu
