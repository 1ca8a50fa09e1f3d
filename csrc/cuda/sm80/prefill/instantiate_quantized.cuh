// Instantiates the kernel of one (T, kD) over quantised K and V, of any format.
#pragma once

#include "../../launch.h"
#include "config.h"
#include "kernel.cuh"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_quantized_prefill(const PrefillArgs& args, unsigned ctas, cudaStream_t stream) {
  using C = QuantizedPrefillConfig<kD>;
  launch_kernel("sm80 prefill", prefill_sm80_kernel<T, C, true, false>, dim3(ctas), C::kThreads,
                C::kSharedBytes, stream, args);
}

}  // namespace gqa::cuda::sm80
