// Attention of few query tokens: split-KV, with the rows of a group packed (sm_80 and later).
//
// Grid      parts x tiles. Tiles are an upper bound over every head map of the shape, and parts (of
//           the keys of a sequence, parts.cuh) over all lengths, so that the grid never depends on
//           what lies on the device; surplus CTAs return at once.
// CTA       up to 16 rows (query heads of one group x query tokens) of one sequence, and one split
//           of the keys they see: each K and V byte is read once per tile, however the group is
//           shaped. Further tiles of a large group read the same bytes at the same time, from L2.
// Warps     4, each with its own 16 of a block's 64 keys, its own ring of stages in shared memory
//           and its own softmax: no barrier of the CTA between the first block and the last.
// Shared    [stage][warp][K: 16 rows | V: 16 rows | scales and zeros], then Q: 16 rows. K and V
//           have their stored form here: the warps dequantise a quantised cache in registers. The
//           16-byte chunks of a row are permuted (load.cuh). After the loop the stages hold the
//           warps' outputs, fp32 [warp][16][kOutStride]. Before it, they are scratch memory of the
//           search for the tile.
// Files     tile.cuh, pipeline.cuh (copies), products.cuh, scores.cuh (masks), online_softmax.cuh,
//           dequantize.cuh, merge_warps.cuh and store.cuh are the steps of the kernel below.
// Result    one split: out and LSE. Several: normalised fp32 outputs and base-2 LSEs; combine.cuh.
// Source    split-KV as in Flash-Decoding (Dao et al. 2023), packed rows as in FlashAttention-3.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../../core/params.h"
#include "../../common/group_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "config.h"
#include "dequantize.cuh"
#include "merge_warps.cuh"
#include "online_softmax.cuh"
#include "pipeline.cuh"
#include "products.cuh"
#include "queries.cuh"
#include "scores.cuh"
#include "tile.cuh"

namespace gqa::cuda::sm80 {

// T: type of the products. S: type in which K and V are stored. Quantised kernels exist only as
// variant kElements, and follow p.elements.
template <class T, class S, class C, DecodeVariant kVariant>
__global__ void __launch_bounds__(kDecodeThreads, C::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr bool kPlain = kVariant == DecodeVariant::kPlain;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ GroupRow rows[kDecodeRows];
  __shared__ DecodeSearch search;
  __shared__ WarpSums sums;
  __shared__ QueryNumbers query_numbers;
  __shared__ typename WarpPipeline<S, C>::Numbers::Rows number_rows;
  const AttentionParams& a = p.attention;
  const bool elements = kVariant == DecodeVariant::kElements && (!C::kQuantized || p.elements);
  const bool bf16 = C::kQuantized ? a.dtype == DType::kBFloat16 : std::is_same_v<T, BFloat16>;

  let_next_kernel_start();  // combine, which waits for all of this one
  const DecodeTile tile = find_tile(p, reinterpret_cast<int*>(smem), search, rows);
  if (tile.group.num_rows == 0) return;
  if (tile.begin >= tile.end) {
    write_unread_rows(p, tile, rows, bf16, elements);
    return;
  }

  const uint32_t s_loop = smem_u32(smem), s_q = s_loop + C::kQBegin;
  const WarpPipeline<S, C> pipeline(p, tile, s_loop, elements, number_rows);
  if constexpr (C::kQuantized) __syncthreads();  // number_rows
  uint32_t page = pipeline.fill();

  if constexpr (C::kQuantized) {
    load_half_queries<S, C>(a, tile.queries, rows, s_q, query_numbers, elements);
  } else {
    load_queries<C>(a, tile.queries, rows, s_q, elements);
  }
  __syncthreads();  // Q is there
  QueryOperands<C> queries(s_q);

  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;  // the lane's rows: g and g + 8
  DecodeRow row[2];
  float q_factor[2], q_sum[2];  // of quantised kernels
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto [head, token] = rows[g + 8 * h];
    row[h] = decode_row<kPlain>(a, tile.b, head, token, static_cast<int>(tile.queries.count),
                                tile.length);
    row[h].end = min(row[h].end, tile.end);
    if constexpr (C::kQuantized) {
      q_factor[h] = query_numbers.factor[g + 8 * h];
      q_sum[h] = query_numbers.sum[g + 8 * h];
    }
  }
  const float to_base2 = kPlain ? a.scale * kLog2e : 1.f;
  WarpState<C> state;

  for (int n = 0; n < pipeline.blocks; ++n) {
    const uint32_t s_k = pipeline.stage(n), s_v = s_k + C::kTileBytes;
    pipeline.wait();  // for K
    float s[2][4] = {};
    multiply_keys<T, S, C>(s, queries, s_k);
    LaneNumbers lane_numbers;
    if constexpr (C::kQuantized) lane_numbers.load<S>(a, s_k + 2 * C::kTileBytes);
    __syncwarp();  // K is read: its place may be filled again
    pipeline.load_k(n + C::kStages, page);

    if constexpr (C::kQuantized) lane_numbers.scale_scores(a, s, q_factor, q_sum);
    modify_scores<kPlain>(a, row, pipeline.first + n * kDecodeBlock + 2 * t, s);
    float alpha[2];
    state.soften(s, to_base2, lane_numbers, alpha);
    if constexpr (C::kQuantized) lane_numbers.scale_probabilities(s);
    state.rescale_output(alpha);
    const uint32_t probabilities[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                                       pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
    if constexpr (C::kQuantized) {
      if (a.v_zero != nullptr) {
        state.rescale_offsets(alpha);
        lane_numbers.add_offsets(state.offset, probabilities);
      }
    }

    pipeline.wait();  // for V
    multiply_values<T, S, C>(state.o, probabilities, s_v);
    __syncwarp();  // V is read
    pipeline.load_v(n + C::kStages, page);
    page = pipeline.page(n + C::kStages + 1);
  }
  cp_async_wait<0>();

  leave_outputs<S>(state, to_base2, sums, s_loop);
  store_rows<C>(p, tile, rows, sums, s_loop, bf16, elements);
}

}  // namespace gqa::cuda::sm80
