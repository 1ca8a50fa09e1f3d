// Stores a row's results, rounded, in global memory.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"

namespace gqa::cuda::sm80 {

// The row of a part's partial results.
__device__ __forceinline__ int64_t partial_row(const AttentionParams& a, int64_t part, int64_t head,
                                               int64_t token) {
  return (part * a.num_heads + head) * a.q_len + token;
}

// Stores four output elements, of which `count` exist. `elements`: `to` may be unaligned.
__device__ __forceinline__ void store_out(uint16_t* to, float4 x, int count, bool bf16,
                                          bool elements) {
  const uint32_t low = bf16 ? pack<BFloat16>(x.x, x.y) : pack<Float16>(x.x, x.y);
  const uint32_t high = bf16 ? pack<BFloat16>(x.z, x.w) : pack<Float16>(x.z, x.w);
  if (elements) {
    const uint32_t pairs[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
    }
  } else if (count > 0) {
    st_global_v2(to, low, high);
  }
}

}  // namespace gqa::cuda::sm80
