// A warp's state of its rows: output, maximum and sum so far. A lane has rows g and g + 8.
#pragma once

#include <cstdint>

#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "config.h"
#include "dequantize.cuh"

namespace gqa::cuda::sm80 {

template <class C>
struct WarpState {
  float o[C::kD / 8][4] = {};
  float row_max[2] = {minus_infinity(), minus_infinity()}, row_sum[2] = {};
  float offset[2] = {};  // what the zeros of V make too much in o

  // Scores to probabilities. `to_base2` brings scores to base 2. Returns, in alpha, what earlier
  // outputs and sums are worth under the new maximum; the sums have it already.
  __device__ __forceinline__ void soften(float (&s)[2][4], float to_base2,
                                         const LaneNumbers& numbers, float (&alpha)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float larger = row_max[h];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = s[e >> 1][2 * h + (e & 1)];
        larger = fmaxf(larger, C::kQuantized ? x + numbers.log2_v_scale(e) : x);
      }
      larger = quad_max(larger);
      const float shift = softmax_shift(larger) * to_base2;
      alpha[h] = exp2_approx(fmaf(row_max[h], to_base2, -shift));
      row_max[h] = larger;
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s[e >> 1][2 * h + (e & 1)];
        x = exp2_approx(fmaf(x, to_base2, -shift));
        sum += x;
      }
      row_sum[h] = row_sum[h] * alpha[h] + sum;
    }
  }

  __device__ __forceinline__ void rescale_output(const float (&alpha)[2]) {
    if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {  // rare after the first blocks
#pragma unroll
      for (int j = 0; j < C::kD / 8; ++j) {
        o[j][0] *= alpha[0], o[j][1] *= alpha[0];
        o[j][2] *= alpha[1], o[j][3] *= alpha[1];
      }
    }
  }

  __device__ __forceinline__ void rescale_offsets(const float (&alpha)[2]) {
    offset[0] *= alpha[0], offset[1] *= alpha[1];
  }
};

}  // namespace gqa::cuda::sm80
