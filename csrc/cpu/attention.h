// Entry point of the CPU kernels. Torch-free: threads come in from the caller.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace gqa::cpu {

// The caller's thread pool.
struct ThreadPool {
  int num_threads;
  // Calls body(context, i) for every i in [0, n), possibly at the same time.
  void (*run)(int64_t n, void (*body)(void* context, int64_t i), void* context);
};

// Writes params.out and params.lse. lse_wanted: false where nobody will read the LSE, which then
// may be rounded as the output is. Throws std::invalid_argument for a bad GQA_KERNELS_CPU_ISA.
void attention_forward(const AttentionParams& params, const ThreadPool& pool,
                       bool lse_wanted = true);

}  // namespace gqa::cpu
