// Instantiates the kernels of one (T, kD).
#pragma once

#include <type_traits>

#include "../../launch.h"
#include "config.h"
#include "kv_kernel.cuh"
#include "q_kernel.cuh"

namespace gqa::cuda::sm80 {

// f(general, dropout), as constants, for the call's instance.
template <class F>
void with_variant(const BackwardArgs& args, bool general, F f) {
  if (args.params.call.dropout_threshold != 0) return f(std::true_type(), std::true_type());
  if (general) return f(std::true_type(), std::false_type());
  f(std::false_type(), std::false_type());
}

template <class T, int kD>
void launch_backward_kv(const BackwardArgs& args, bool general, unsigned ctas,
                        cudaStream_t stream) {
  using C = BackwardConfig<kD>;
  const auto start = [&](auto kernel) {
    launch_kernel("sm80 backward, dK and dV", kernel, dim3(ctas), C::kThreads, C::kSharedBytes,
                  stream, args);
  };
  with_variant(args, general, [&](auto is_general, auto drops) {
    constexpr bool kGeneral = decltype(is_general)::value, kDropout = decltype(drops)::value;
    if constexpr (C::kBothGradients) {
      start(backward_kv_kernel<T, C, kGeneral, kDropout, true, true>);
    } else if (args.params.dk != nullptr) {
      start(backward_kv_kernel<T, C, kGeneral, kDropout, true, false>);
    } else {
      start(backward_kv_kernel<T, C, kGeneral, kDropout, false, true>);
    }
  });
}

template <class T, int kD>
void launch_backward_q(const BackwardArgs& args, bool general, unsigned ctas, cudaStream_t stream) {
  using C = BackwardConfig<kD>;
  with_variant(args, general, [&](auto is_general, auto drops) {
    constexpr bool kGeneral = decltype(is_general)::value, kDropout = decltype(drops)::value;
    launch_kernel("sm80 backward, dQ", backward_q_kernel<T, C, kGeneral, kDropout>, dim3(ctas),
                  C::kThreads, C::kSharedBytes, stream, args);
  });
}

}  // namespace gqa::cuda::sm80
