// Entry point of the CPU kernels. Torch-free: threads come in from the caller.
#pragma once

#include "../../core/params.h"
#include "../key_ranges.h"
#include "../thread_pool.h"
#include "auxiliary.h"

namespace gqa::cpu {

// Writes params.out, params.lse and the auxiliary results. lse_wanted: false if nobody will read the
// LSE, which may then be as inexact as the output. batch_invariant: the bits of a query's results
// depend on its own keys alone. ranges: the keys that each query may see. Throws
// std::invalid_argument for a bad GQA_KERNELS_CPU_ISA.
void attention_forward(const AttentionParams& params, const ThreadPool& pool,
                       bool lse_wanted = true, bool batch_invariant = false,
                       const KeyRanges& ranges = {}, const Auxiliary& wanted = {});

}  // namespace gqa::cpu
