// Instantiates the kernels of one (T, kD).
#pragma once

#include "../../launch.h"
#include "combine.cuh"
#include "config.h"
#include "kernel.cuh"

namespace gqa::cuda::sm80 {

template <class T, int kD>
void launch_decode(const DecodeParams& params, DecodeVariant variant, cudaStream_t stream) {
  const AttentionParams& a = params.attention;
  const auto kernel = variant == DecodeVariant::kPlain ? decode_kernel<T, kD, DecodeVariant::kPlain>
                      : variant == DecodeVariant::kGeneral
                          ? decode_kernel<T, kD, DecodeVariant::kGeneral>
                          : decode_kernel<T, kD, DecodeVariant::kElements>;
  const dim3 grid(static_cast<unsigned>(params.tiles * a.batch), params.splits);
  launch_kernel("sm80 decode", kernel, grid, kDecodeThreads, DecodeConfig<kD>::kSharedBytes, stream,
                params);
  if (params.splits == 1) return;
  const int64_t rows = a.batch * a.num_heads * a.q_len;
  const auto combine =
      variant == DecodeVariant::kElements ? combine_kernel<T, true> : combine_kernel<T, false>;
  launch_kernel("sm80 decode combine", combine,
                dim3(static_cast<unsigned>((rows + kCombineWarps - 1) / kCombineWarps)),
                kCombineWarps * 32, 0, stream, params);
}

}  // namespace gqa::cuda::sm80
