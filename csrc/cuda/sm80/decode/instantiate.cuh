// Instantiates the kernels of an (S, kD).
#pragma once

#include <type_traits>

#include "../../launch.h"
#include "config.h"
#include "kernel.cuh"

namespace gqa::cuda::sm80 {

template <class S, int kD>
void launch_decode(const DecodeParams& params, DecodeVariant variant, cudaStream_t stream) {
  using C = DecodeConfig<kD, kStoredBits<S>>;
  using T = std::conditional_t<C::kQuantized, Float16, S>;
  auto kernel = decode_kernel<T, S, C, DecodeVariant::kElements>;
  if constexpr (!C::kQuantized) {
    if (variant == DecodeVariant::kPlain) kernel = decode_kernel<T, S, C, DecodeVariant::kPlain>;
    if (variant == DecodeVariant::kGeneral) {
      kernel = decode_kernel<T, S, C, DecodeVariant::kGeneral>;
    }
  }
  const dim3 grid(static_cast<unsigned>(params.tiles) * params.parts);
  launch_kernel("sm80 decode", kernel, grid, kDecodeThreads, C::kSharedBytes, stream, params);
}

}  // namespace gqa::cuda::sm80
