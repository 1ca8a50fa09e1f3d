// Entry point of the CPU kernels. Torch-free: threads come in from the caller.
#pragma once

#include "../../core/params.h"
#include "../thread_pool.h"
#include "auxiliary.h"

namespace gqa::cpu {

// Writes params.out and params.lse, and what else is wanted. lse_wanted: false if nobody will read the LSE, which then may
// be as inexact as the output. batch_invariant: the bits of a query's results depend on its own keys
// alone. Throws std::invalid_argument for a bad GQA_KERNELS_CPU_ISA.
void attention_forward(const AttentionParams& params, const ThreadPool& pool,
                       bool lse_wanted = true, bool batch_invariant = false,
                       const Auxiliary& wanted = {});

}  // namespace gqa::cpu
