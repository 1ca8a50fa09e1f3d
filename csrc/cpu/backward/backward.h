// Entry point of the CPU backward kernels. Torch-free, like attention.h.
#pragma once

#include "../../core/backward_params.h"
#include "../forward/attention.h"

namespace gqa::cpu {

// Writes params.dq, dk, dv and, unless they are null, dslopes and dsinks. The same number of
// threads computes the same bits. batch_invariant, ranges: of the forward call. first_sequence: the
// number in the forward call of the first sequence, by which dropout counts. Throws
// std::invalid_argument for a bad GQA_KERNELS_CPU_ISA.
void attention_backward(const BackwardParams& params, const ThreadPool& pool,
                        bool batch_invariant = false, const KeyRanges& ranges = {},
                        int64_t first_sequence = 0);

}  // namespace gqa::cpu
