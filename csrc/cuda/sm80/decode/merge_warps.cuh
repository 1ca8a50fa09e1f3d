// Merges the states of the four warps into the rows' results.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/group_rows.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "../../common/stored_numbers.cuh"
#include "config.h"
#include "dequantize.cuh"
#include "online_softmax.cuh"
#include "store.cuh"
#include "tile.cuh"

namespace gqa::cuda::sm80 {

// In shared memory: each warp's maximum, in base 2, and sum of each row.
struct WarpSums {
  float max[kDecodeWarps][kDecodeRows], sum[kDecodeWarps][kDecodeRows];

  // The shift of row r's exponents: the largest of the maxima.
  __device__ __forceinline__ float shift(int r) const {
    float larger = max[0][r];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) larger = fmaxf(larger, max[w][r]);
    return softmax_shift(larger);
  }
};

// Leaves each warp's output, brought to the maximum of all, where the stages were: fp32
// [warp][16][kOutStride].
template <class S, class C>
__device__ __forceinline__ void leave_outputs(WarpState<C>& state, float to_base2, WarpSums& sums,
                                              uint32_t s_loop) {
  using Numbers = StoredNumbers<S>;
  constexpr int kN = Numbers::kPerUnit;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    state.row_sum[h] = quad_sum(state.row_sum[h]);
    if (t == 0) {
      sums.max[warp][g + 8 * h] = state.row_max[h] * to_base2;
      sums.sum[warp][g + 8 * h] = state.row_sum[h];
    }
  }
  __syncthreads();  // every warp is past its stages; its maxima and sums are there
  const uint32_t s_out = s_loop + warp * kDecodeRows * C::kOutStride * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = g + 8 * h;
    float factor = exp2_approx(state.row_max[h] * to_base2 - sums.shift(r));
    if constexpr (C::kQuantized) {
      state.offset[h] = quad_sum(state.offset[h]);
      factor *= Numbers::kPart / kLargestWeight;
    }
    // Number i of unit u of chunk c, dim 8 N c + N u + i, is column u of o[N c + i]: a lane has two
    // neighbouring units.
    auto piece = [&](int c, int i) {
      return (state.o[c * kN + i % kN][2 * h + i / kN] - state.offset[h]) * factor;
    };
#pragma unroll
    for (int c = 0; c < C::kD / (8 * kN); ++c) {
      const uint32_t to = s_out + (r * C::kOutStride + (c * 8 + 2 * t) * kN) * 4;
      if constexpr (kN == 1) {
        st_shared_v2(to, piece(c, 0), piece(c, 1));
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kN; i += 4) {
          st_shared_v4(to + i * 4, piece(c, i), piece(c, i + 1), piece(c, i + 2), piece(c, i + 3));
        }
      }
    }
  }
  __syncthreads();  // the outputs of all warps are there
}

// Adds up what the warps left and stores it: out and LSE, or with several splits a partial result.
template <class C>
__device__ __forceinline__ void store_rows(const DecodeParams& p, const DecodeTile& tile,
                                           const GroupRow* rows, const WarpSums& sums,
                                           uint32_t s_loop, bool bf16, bool elements) {
  const AttentionParams& a = p.attention;
  constexpr int kLanes = C::kD / 4;  // threads of a row, one float4 each
  const int dim = static_cast<int>(a.value_head_dim);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.group.num_rows * kLanes; i += kDecodeThreads) {
    const int r = i / kLanes, d = i % kLanes * 4;
    const auto [head, token] = rows[r];
    float shift = sums.shift(r), sum = 0.f;
    float4 x = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      sum += sums.sum[w][r] * exp2_approx(sums.max[w][r] - shift);
      const float4 y = ld_shared_v4(s_loop + ((w * kDecodeRows + r) * C::kOutStride + d) * 4);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const bool merged_later = tile.part.splits > 1;
    float factor = 1.f;
    if (a.sinks != nullptr && !merged_later) factor = add_sink(a.sinks[head], shift, sum);
    if (sum != 0.f) factor /= sum;
    x.x *= factor, x.y *= factor, x.z *= factor, x.w *= factor;
    if (merged_later) {
      const int64_t at = partial_row(a, tile.part.number, head, token);
      if (d < dim) st_global_v4(p.partial_out + at * p.partial_stride + d, x.x, x.y, x.z, x.w);
      if (d == 0) p.partial_lse[at] = sum == 0.f ? minus_infinity() : shift + __log2f(sum);
    } else {
      uint16_t* out = static_cast<uint16_t*>(a.out) + out_offset(a, tile.queries, head, token) + d;
      store_out(out, x, dim - d, bf16, elements);
      if (d == 0) a.lse[lse_offset(a, tile.queries, head, token)] = natural_lse(shift, sum);
    }
  }
}

}  // namespace gqa::cuda::sm80
