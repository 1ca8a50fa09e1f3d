// Gradient of Q, and of ALiBi slopes and sinks: FlashAttention-2's backward (Dao 2023, algorithm 2)
// in a second pass, so that nothing is summed through memory.
//
// Grid      one CTA for each (block of kBlockM query tokens, query head, sequence), in the order of
//           the prefill's; see query_tile.cuh.
// CTA       walks over the keys that its rows see, kBlockN at a time; recomputes P and dS, and adds
//           up dQ += dS K in fp32 registers. A head whose map entry is out of range gets NaN. Of
//           the slope's and the sink's gradients each CTA leaves a sum, to be added up in a fixed
//           order.
// Warp      kWarpRows rows, all keys of a step; dS is the first operand of its product as it comes
//           out of the registers.
// Shared    Q and dO, and two slots for K and V, requested as in the kernel for dK and dV.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/mask.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "../hidden_keys.cuh"
#include "../products.cuh"
#include "../query_tile.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"
#include "gradients.cuh"
#include "load.cuh"
#include "store.cuh"

namespace gqa::cuda::sm80 {

// The same dQ for all rows of a tile, by the whole CTA.
template <class T, class C>
__device__ __forceinline__ void fill_dq(const BackwardArgs& args, const QueryTile& tile,
                                        float value) {
  const BackwardParams& params = args.params;
  const int rows = min(C::kBlockM, tile.q_len - tile.token);
  const int dim = static_cast<int>(params.call.head_dim);
  const uint16_t bits = static_cast<uint16_t>(pack<T>(value, value));
  T* first = row_at<T>(params.dq, params.dq_stride, tile.q_batch, tile.head,
                       tile.first_token + tile.token);
  for (int row = threadIdx.x / 32; row < rows; row += C::kWarps) {
    for (int d = threadIdx.x % 32; d < dim; d += 32)
      first[row * params.dq_stride.s + d].bits = bits;
  }
}

// Stores the CTA's sums; called by its first thread.
template <class C>
__device__ __forceinline__ void store_sums(const BackwardArgs& args, const QueryTile& tile,
                                           HeadSums sums) {
  if (args.head_sums == nullptr || threadIdx.x != 0) return;
  const int64_t pair = tile.b * args.params.call.num_heads + tile.head;
  args.head_sums[pair * args.sum_blocks + tile.token / C::kBlockM] = sums;
}

// A lane's part of the sums over the warp's rows.
template <class C>
__device__ __forceinline__ HeadSums sum_rows(const BackwardArgs& args, const QueryTile& tile,
                                             int warp_token,
                                             const RowNumbers (&numbers)[C::kRowTiles][2],
                                             const RowSums (&sums)[C::kRowTiles][2]) {
  const AttentionParams& call = args.params.call;
  const Queries queries{tile.q_batch, tile.first_token, tile.q_len};
  const float sink = call.sinks == nullptr ? minus_infinity() : call.sinks[tile.head] * kLog2e;
  HeadSums of_rows{0.0f, 0.0f};
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      RowSums row = sums[m][h];
#pragma unroll
      for (int lanes = 2; lanes > 0; lanes /= 2) {  // the four lanes that share a row
        row.dp += __shfl_xor_sync(~0u, row.dp, lanes);
        row.distance += __shfl_xor_sync(~0u, row.distance, lanes);
        row.dp_distance += __shfl_xor_sync(~0u, row.dp_distance, lanes);
      }
      const int token = lane_token(warp_token, m, h);
      const float lse = numbers[m][h].lse;
      // A row that sees no key adds nothing, and its LSE may have any gradient.
      if (threadIdx.x % 4 != 0 || token >= tile.q_len || lse == -minus_infinity()) continue;
      float delta = row.dp;
      if (args.params.dlse != nullptr) {
        delta -= args.params.dlse[lse_offset(call, queries, tile.head, token)];
      }
      of_rows.slope += fmaf(delta, row.distance, -row.dp_distance);
      of_rows.sink = fmaf(-exp2_approx(sink - lse), delta, of_rows.sink);
    }
  }
  return of_rows;
}

// The rows of the sequence's first key in the tile's heads of K and V.
template <class T>
struct FirstRows {
  const T *k, *v;
};

// K and V of a step's keys; zeros beyond the sequence's.
template <class T, class C, bool kGeneral>
__device__ __forceinline__ void load_step(const BackwardArgs& args, uint32_t slot,
                                          const FirstRows<T>& rows, int length, int first_key) {
  const AttentionParams& call = args.params.call;
  load_rows<T, C, C::kBlockN, kGeneral>(args, slot, rows.k + first_key * call.k_stride.s,
                                        call.k_stride.s, length - first_key, call.head_dim);
  load_rows<T, C, C::kBlockN, kGeneral>(args, slot + C::kStepBytes,
                                        rows.v + first_key * call.v_stride.s, call.v_stride.s,
                                        length - first_key, call.value_head_dim);
}

// The warp's rows of Q or dO as first operands, from registers or shared memory.
template <class C>
struct OwnRows {
  TileFragments tile;
  uint32_t fragments[C::kOwnInRegisters ? C::kD / 16 : 1][C::kRowTiles][4];

  __device__ __forceinline__ OwnRows(uint32_t rows, const LaneOffsets<C>& offsets)
      : tile(rows, offsets.qv) {
    if constexpr (C::kOwnInRegisters) {
#pragma unroll
      for (int i = 0; i < C::kD / 16 * C::kRowTiles; ++i) {
        const int step = i / C::kRowTiles, m = i % C::kRowTiles;
        ldmatrix_x4(fragments[step][m], tile.template address<C>(m * 16, step));
      }
    }
  }
  __device__ __forceinline__ void operator()(uint32_t (&a)[4], int m, int step) const {
    if constexpr (C::kOwnInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragments[step][m][i];
    } else {
      ldmatrix_x4(a, tile.template address<C>(m * 16, step));
    }
  }
};

// kSums: whether the kernel can sum gradients of slopes and sinks.
template <class T, class C, bool kGeneral, bool kSums>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    backward_q_kernel(const __grid_constant__ BackwardArgs args) {
  const BackwardParams& params = args.params;
  const AttentionParams& call = params.call;
  extern __shared__ __align__(128) uint8_t shared[];
  // Used only a few times per step, so these are not worth registers.
  __shared__ QueryTile tile;
  __shared__ FirstRows<T> first_rows;
  __shared__ TokenRange warp_keys[C::kWarps];
  __shared__ HeadSums warp_sums[C::kWarps];
  __shared__ int end_key;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t q_base = smem_u32(shared), dout_base = q_base + C::kOwnBytes;
  const uint32_t ring = q_base + C::kRingOffset;
  int first_key;
  {
    const QueryTile t =
        find_query_tile<C>(call, args.section_pairs, reinterpret_cast<int*>(shared));
    // Of packed sequences, shorter ones have no such tokens.
    if (t.token >= t.q_len) {
      store_sums<C>(args, t, {0.0f, 0.0f});
      return;
    }
    const TokenRange keys = token_range(call, t.length, t.q_len, t.token, C::kBlockM);
    first_key = max(0, keys.begin) / C::kBlockN * C::kBlockN;
    if (!t.valid || first_key >= keys.end) {
      fill_dq<T, C>(args, t, t.valid ? 0.0f : not_a_number());
      store_sums<C>(args, t, {0.0f, 0.0f});
      return;
    }
    const int64_t slot = first_slot(call, t.b);
    const FirstRows<T> first{row_at<T>(call.k, call.k_stride, t.b, t.k_head, slot),
                             row_at<T>(call.v, call.v_stride, t.b, t.v_head, slot)};
    if (threadIdx.x == 0) {
      tile = t;
      first_rows = first;
      end_key = keys.end;
    }
    if (threadIdx.x % 32 == 0) {
      warp_keys[warp] =
          token_range(call, t.length, t.q_len, t.token + warp * C::kWarpRows, C::kWarpRows);
    }
    const int rows = t.q_len - t.token;
    const int64_t row = t.first_token + t.token;
    load_rows<T, C, C::kBlockM, kGeneral>(args, q_base,
                                          row_at<T>(call.q, call.q_stride, t.q_batch, t.head, row),
                                          call.q_stride.s, rows, call.head_dim);
    load_rows<T, C, C::kBlockM, kGeneral>(
        args, dout_base, row_at<T>(params.dout, params.dout_stride, t.q_batch, t.head, row),
        params.dout_stride.s, rows, call.value_head_dim);
    load_step<T, C, kGeneral>(args, ring, first, t.length, first_key);
    cp_async_commit();
    __syncthreads();  // tile, keys
  }

  const LaneOffsets<C> offsets;
  const int warp_token = tile.token + warp * C::kWarpRows;
  const uint32_t own_rows = warp * C::kWarpRows * C::kRowBytes;
  RowNumbers numbers[C::kRowTiles][2];
  const RowNumbers* first =
      args.numbers + first_numbers(args, tile.b) + tile.head * args.padded_len;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane_token(warp_token, m, h);
      // Past the last token Q and dO are zeros: any finite numbers do.
      numbers[m][h] = token < tile.q_len ? first[token] : RowNumbers{0.0f, 0.0f};
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // Q and dO
  const OwnRows<C> q(q_base + own_rows, offsets), dout(dout_base + own_rows, offsets);
  Output<C> dq = {};
  RowSums sums[C::kRowTiles][2] = {};
  for (int turn = 0; first_key < end_key; turn ^= 1, first_key += C::kBlockN) {
    cp_async_wait<0>();
    __syncthreads();  // this step's tiles; and every warp is done with those before it
    if (first_key + C::kBlockN < end_key) {
      load_step<T, C, kGeneral>(args, ring + (turn ^ 1) * C::kSlotBytes, first_rows, tile.length,
                                first_key + C::kBlockN);
    }
    cp_async_commit();
    const TokenRange keys = warp_keys[warp];
    if (first_key >= keys.end || first_key + C::kBlockN <= keys.begin) continue;

    const uint32_t k_slot = ring + turn * C::kSlotBytes, v_slot = k_slot + C::kStepBytes;
    Probabilities<C> ds;
    {
      Scores<C> scores, dp;
      multiply_rows<T, C>(scores, q, TileFragments(k_slot, offsets.k));
      multiply_rows<T, C>(dp, dout, TileFragments(v_slot, offsets.k));
      if constexpr (!kGeneral) {
        if (first_key < keys.all_begin || first_key + C::kBlockN > keys.all_end) {
          hide_keys<C>(scores, call, tile.length, tile.q_len, warp_token, first_key);
        }
      }
      gradients_by_token<T, C, kGeneral, kSums>(ds, sums, scores, dp, args, tile, warp_token,
                                                first_key, numbers);
    }
    add_weighted_rows<T, C>(dq, ds, TileFragments(k_slot, offsets.qv));
  }

  store_gradient<T, C>(row_at<T>(params.dq, params.dq_stride, tile.q_batch, tile.head,
                                 tile.first_token + warp_token),
                       params.dq_stride.s, min(C::kWarpRows, tile.q_len - warp_token),
                       call.head_dim, q_base + own_rows, dq, call.scale);
  if (kSums && args.head_sums != nullptr) {
    HeadSums sum = sum_rows<C>(args, tile, warp_token, numbers, sums);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum.slope += __shfl_xor_sync(~0u, sum.slope, lanes);
      sum.sink += __shfl_xor_sync(~0u, sum.sink, lanes);
    }
    if (threadIdx.x % 32 == 0) warp_sums[warp] = sum;
    __syncthreads();  // warp_sums
    for (int w = 1; w < C::kWarps; ++w) {
      sum.slope += warp_sums[w].slope;
      sum.sink += warp_sums[w].sink;
    }
    store_sums<C>(args, tile, sum);
  }
}

}  // namespace gqa::cuda::sm80
