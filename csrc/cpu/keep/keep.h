// Entry point of `keep` on the CPU: move the rows of the kept keys to the front of their sequence.
// Torch-free: threads come in from the caller.
#pragma once

#include "../../core/keep_params.h"
#include "../thread_pool.h"

namespace gqa::cpu {

void cache_keep(const KeepParams& params, const ThreadPool& pool);

}  // namespace gqa::cpu
