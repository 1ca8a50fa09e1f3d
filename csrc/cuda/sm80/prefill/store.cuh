// The end of a tile: sinks, normalisation, LSE, and the output through shared memory in 16-byte
// pieces.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../products.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"
#include "scores.cuh"

namespace gqa::cuda::sm80 {

// The tile's first row of the output; rows follow at out_stride.s.
template <class T>
__device__ __forceinline__ T* output_rows(const PrefillArgs& args, const QueryTile& tile) {
  const AttentionParams& params = args.params;
  return static_cast<T*>(params.out) + tile.q_batch * params.out_stride.b +
         tile.head * params.out_stride.h + (tile.first_token + tile.token) * params.out_stride.s;
}

// The tile's first element of the LSE; rows follow.
__device__ __forceinline__ float* lse_rows(const PrefillArgs& args, const QueryTile& tile) {
  const AttentionParams& params = args.params;
  return params.lse + (tile.q_batch * params.num_heads + tile.head) * params.q_tokens +
         tile.first_token + tile.token;
}

// The same output and LSE for all rows of a tile: one that sees no key, or whose head has none.
template <class T, class C>
__device__ __forceinline__ void fill_tile(const PrefillArgs& args, const QueryTile& tile,
                                          float value, float lse) {
  const int rows = min(C::kBlockM, tile.q_len - tile.token);
  const int dim = static_cast<int>(args.params.value_head_dim);
  const uint16_t bits = static_cast<uint16_t>(pack<T>(value, value));
  T* out = output_rows<T>(args, tile);
  float* lse_out = lse_rows(args, tile);
  for (int row = threadIdx.x / 32; row < rows; row += C::kWarps) {
    T* at = out + row * args.params.out_stride.s;
    for (int d = threadIdx.x % 32; d < dim; d += 32) at[d].bits = bits;
    if (threadIdx.x % 32 == 0) lse_out[row] = lse;
  }
}

// `base`: of the CTA's shared memory; every copy to it has been waited for. `scale`: of the output.
template <class T, class C>
__device__ __forceinline__ void store_output(const PrefillArgs& args, const QueryTile& tile,
                                             uint32_t base, int warp_row, RowState<C>& state,
                                             const Output<C>& output, float scale) {
  const AttentionParams& params = args.params;
  const int lane = threadIdx.x % 32;
  const int rows = min(C::kWarpRows, tile.q_len - tile.token - warp_row);  // of the warp
  const uint32_t staged = base + warp_row * C::kRowBytes;
  if constexpr (C::kQInRegisters) {
    __syncthreads();  // every warp is done with K and V, in whose place the output is staged
  } else {
    __syncwarp();  // the output is staged over Q's rows, which only this warp has read
  }
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + h * 8 + lane / 4;
      float sum = quad_sum(state.sum[m][h]);
      float shift = softmax_shift(state.shift[m][h]);
      float factor = 1.0f;
      if (params.sinks != nullptr) factor = add_sink(params.sinks[tile.head], shift, sum);
      const bool seen = sum != 0.0f;
      factor = seen ? __fdividef(factor, sum) * scale : 0.0f;
      if (lane % 4 == 0 && row < rows) {
        lse_rows(args, tile)[warp_row + row] =
            seen ? (shift + __log2f(sum)) * kLn2 : minus_infinity();
      }
#pragma unroll
      for (int d = 0; d < C::kD / 8; ++d) {
        st_shared_u32(staged_pair<C>(staged, row, d),
                      pack<T>(output[m][d][h * 2] * factor, output[m][d][h * 2 + 1] * factor));
      }
    }
  }
  __syncwarp();  // the rows of the other lanes
  store_rows<T, C>(output_rows<T>(args, tile) + warp_row * params.out_stride.s, params.out_stride.s,
                   rows, static_cast<int>(params.value_head_dim), staged);
}

}  // namespace gqa::cuda::sm80
