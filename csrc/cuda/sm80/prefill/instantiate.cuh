// Instantiates the kernels of one (T, kD).
#pragma once

#include "../../launch.h"
#include "config.h"
#include "kernel.cuh"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_prefill(const PrefillArgs& args, bool general, unsigned ctas, cudaStream_t stream) {
  using C = PrefillConfig<kD>;
  auto kernel = prefill_sm80_kernel<T, C, false, false>;
  if (args.params.page_table != nullptr) {
    kernel =
        general ? prefill_sm80_kernel<T, C, true, true> : prefill_sm80_kernel<T, C, false, true>;
  } else if (general) {
    kernel = prefill_sm80_kernel<T, C, true, false>;
  }
  launch_kernel("sm80 prefill", kernel, dim3(ctas), C::kThreads, C::kSharedBytes, stream, args);
}

}  // namespace gqa::cuda::sm80
