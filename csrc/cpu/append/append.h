// Entry point of the append to caches on the CPU. Torch-free: threads come in from the caller.
#pragma once

#include "../../core/append_params.h"
#include "../forward/attention.h"

namespace gqa::cpu {

// Writes params.k, v, their dynamic scales and zeros, and q_rotated.
void cache_append(const AppendParams& params, const ThreadPool& pool);

}  // namespace gqa::cpu
