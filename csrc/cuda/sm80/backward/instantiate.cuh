// Instantiates the kernels of one (T, kD).
#pragma once

#include "../../launch.h"
#include "config.h"
#include "kv_kernel.cuh"
#include "q_kernel.cuh"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_backward_kv(const BackwardArgs& args, bool general, unsigned ctas,
                        cudaStream_t stream) {
  using C = BackwardConfig<kD>;
  const auto start = [&](auto kernel) {
    launch_kernel("sm80 backward, dK and dV", kernel, dim3(ctas), C::kThreads, C::kSharedBytes,
                  stream, args);
  };
  if constexpr (C::kBothGradients) {
    start(general ? backward_kv_kernel<T, C, true, true, true>
                  : backward_kv_kernel<T, C, false, true, true>);
  } else if (args.params.dk != nullptr) {
    start(general ? backward_kv_kernel<T, C, true, true, false>
                  : backward_kv_kernel<T, C, false, true, false>);
  } else {
    start(general ? backward_kv_kernel<T, C, true, false, true>
                  : backward_kv_kernel<T, C, false, false, true>);
  }
}

template <class T, int kD>
void launch_backward_q(const BackwardArgs& args, bool general, unsigned ctas, cudaStream_t stream) {
  using C = BackwardConfig<kD>;
  const auto start = [&](auto kernel) {
    launch_kernel("sm80 backward, dQ", kernel, dim3(ctas), C::kThreads, C::kSharedBytes, stream,
                  args);
  };
  if (general) {
    start(backward_q_kernel<T, C, true, true>);
  } else if (args.head_sums != nullptr) {
    start(backward_q_kernel<T, C, false, true>);
  } else {
    start(backward_q_kernel<T, C, false, false>);
  }
}

}  // namespace gqa::cuda::sm80
