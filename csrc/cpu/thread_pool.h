// The caller's thread pool: the kernels have no threads of their own.
#pragma once

#include <cstdint>

#include "float_mode.h"

namespace gqa::cpu {

struct ThreadPool {
  int num_threads;
  // Calls body(context, i) for every i in [0, n), possibly at the same time.
  void (*run)(int64_t n, void (*body)(void* context, int64_t i), void* context);
};

// Calls work.run_worker(i) for every i in [0, n) on the pool's threads, each in the default
// floating-point mode.
template <class Work>
void run_workers(const ThreadPool& pool, int64_t n, Work& work) {
  pool.run(
      n,
      [](void* context, int64_t i) {
        const DefaultFloatMode mode;
        static_cast<Work*>(context)->run_worker(i);
      },
      &work);
}

}  // namespace gqa::cpu
