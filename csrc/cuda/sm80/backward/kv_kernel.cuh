// Gradients of K and V, summed over the query heads of a group: after FlashAttention-2 (Dao 2023,
// algorithm 2), the loops swapped, so that nothing is summed through memory.
//
// Grid      one CTA for each (key head, sequence, block of kBlockM keys); see kv_walk.cuh.
// CTA       walks over the heads of its group and, for each, over the query tokens that see its
//           keys, kBlockN at a time; recomputes P and dS from Q, dO and the rows' numbers; adds up
//           dV += P^T dO and dK += dS^T Q in fp32 registers. Each element is written once: no
//           atomics, no expanded gradients, the same bits every time. A group without heads writes
//           zeros.
// Warp      kWarpRows keys, all tokens of a step. Tiles are keys x tokens: P^T and dS^T are first
//           operands of their products as they come out of the registers.
// Shared    K and V, and two slots for Q, dO and the tokens' numbers. A step's are requested one
//           step ahead, behind the barrier that says its slot was read.
// Maps      if V is grouped apart, one launch over the groups of K writes dK and loads V again for
//           each head. Another launch over the groups of V writes dV and loads K again. At kD 256
//           there are always two launches, because one would run out of registers.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/ptx.cuh"
#include "../products.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"
#include "gradients.cuh"
#include "kv_walk.cuh"
#include "load.cuh"
#include "store.cuh"

namespace gqa::cuda::sm80 {

// The tile's rows of K or V for a step's head; zeros beyond the sequence's keys, whose P is 0, but
// 0 times a NaN there would not be.
template <class T, class C, bool kGeneral>
__device__ __forceinline__ void load_keys(const BackwardArgs& args, uint32_t to, bool keys,
                                          const KvTile& tile, const KvStep& step) {
  const AttentionParams& call = args.params.call;
  const Strides& strides = keys ? call.k_stride : call.v_stride;
  load_rows<T, C, C::kBlockM, kGeneral>(
      args, to,
      row_at<T>(keys ? call.k : call.v, strides, tile.b, keys ? step.k_head : step.v_head,
                tile.first_slot + tile.first_key),
      strides.s, step.length - tile.first_key, keys ? call.head_dim : call.value_head_dim);
}

// Q, dO and the numbers of a step's tokens.
template <class T, class C, bool kGeneral>
__device__ __forceinline__ void load_tokens(const BackwardArgs& args, uint32_t slot,
                                            const KvTile& tile, const KvStep& step) {
  const BackwardParams& params = args.params;
  const AttentionParams& call = params.call;
  const int rows = tile.q_len - step.token;
  const int64_t token = tile.first_token + step.token;
  load_rows<T, C, C::kBlockN, kGeneral>(
      args, slot, row_at<T>(call.q, call.q_stride, tile.q_batch, step.head, token), call.q_stride.s,
      rows, call.head_dim);
  load_rows<T, C, C::kBlockN, kGeneral>(
      args, slot + C::kStepBytes,
      row_at<T>(params.dout, params.dout_stride, tile.q_batch, step.head, token),
      params.dout_stride.s, rows, call.value_head_dim);
  load_numbers<C>(slot + C::kNumbersOffset,
                  args.numbers + tile.first_numbers + step.head * args.padded_len + step.token);
}

// kKeys, kValues: whether the kernel can compute dK and dV.
template <class T, class C, bool kGeneral, bool kKeys, bool kValues>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    backward_kv_kernel(const __grid_constant__ BackwardArgs args) {
  const BackwardParams& params = args.params;
  const AttentionParams& call = params.call;
  extern __shared__ __align__(128) uint8_t shared[];
  // Used only a few times per step, so these are not worth registers.
  __shared__ uint32_t members[kMaxBackwardHeads / 32];
  __shared__ KvStep steps[2];
  __shared__ KvTile tile;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t k_base = smem_u32(shared), v_base = k_base + C::kOwnBytes;
  const uint32_t ring = k_base + C::kRingOffset;
  const bool sums_dk = kKeys && params.dk != nullptr, sums_dv = kValues && params.dv != nullptr;
  {
    const KvTile t = find_kv_tile<C>(args, members, reinterpret_cast<int*>(shared));
    if (t.first_key >= t.end_key) return;
    if (threadIdx.x == 0) tile = t;
    __syncthreads();  // members, tile
    const KvStep step = first_step<C>(args, t, members, 0);
    if (threadIdx.x == 0) steps[0] = step;
    if (step.head >= 0) {
      if (args.shared || !args.by_value) load_keys<T, C, kGeneral>(args, k_base, true, t, step);
      if (args.shared && sums_dk) load_keys<T, C, kGeneral>(args, v_base, false, t, step);
      load_tokens<T, C, kGeneral>(args, ring, t, step);
    }
    cp_async_commit();
  }

  const LaneOffsets<C> offsets;
  const uint32_t own_rows = warp * C::kWarpRows * C::kRowBytes;
  Output<C> dk = {}, dv = {};
  for (int turn = 0;; turn ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this step's tiles; and every warp is done with those before it
    const KvStep& step = steps[turn];  // stays in shared memory
    if (step.head < 0) break;
    if (!args.shared && step.first) {
      load_keys<T, C, kGeneral>(args, args.by_value ? k_base : v_base, args.by_value, tile, step);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // the head's own K or V
    }
    {
      const KvStep next = next_step<C>(args, tile, members, step);
      if (threadIdx.x == 0) steps[turn ^ 1] = next;
      if (next.head >= 0) {
        load_tokens<T, C, kGeneral>(args, ring + (turn ^ 1) * C::kSlotBytes, tile, next);
      }
      cp_async_commit();
    }
    const Visibility keys = visibility<C>(tile, step, warp * C::kWarpRows, C::kWarpRows);
    if (!keys.any) continue;

    const uint32_t q_slot = ring + turn * C::kSlotBytes, dout_slot = q_slot + C::kStepBytes;
    const auto own = [&](const TileFragments& rows) {
      return [=](uint32_t (&a)[4], int m, int d) { ldmatrix_x4(a, rows.address<C>(m * 16, d)); };
    };
    Probabilities<C> p, ds;
    {
      Scores<C> scores, dp = {};
      multiply_rows<T, C>(scores, own(TileFragments(k_base + own_rows, offsets.qv)),
                          TileFragments(q_slot, offsets.k));
      if (sums_dk) {
        multiply_rows<T, C>(dp, own(TileFragments(v_base + own_rows, offsets.qv)),
                            TileFragments(dout_slot, offsets.k));
      }
      const int first_key = tile.first_key + warp * C::kWarpRows;
      if constexpr (!kGeneral) {
        if (!keys.all) hide_from_tokens<C>(scores, call, tile, step, first_key);
      }
      gradients_by_key<T, C, kGeneral>(p, ds, scores, dp, args, tile, step, first_key,
                                       q_slot + C::kNumbersOffset);
    }
    if (sums_dv) add_weighted_rows<T, C>(dv, p, TileFragments(dout_slot, offsets.qv));
    if (sums_dk) add_weighted_rows<T, C>(dk, ds, TileFragments(q_slot, offsets.qv));
  }

  const int first_key = tile.first_key + warp * C::kWarpRows;
  const int rows = min(C::kWarpRows, tile.end_key - first_key);
  const int slot = tile.first_slot + first_key;
  if (sums_dk) {
    store_gradient<T, C>(row_at<T>(params.dk, params.dk_stride, tile.b, tile.group, slot),
                         params.dk_stride.s, rows, call.head_dim, k_base + own_rows, dk,
                         call.scale);
  }
  if (sums_dv) {
    store_gradient<T, C>(row_at<T>(params.dv, params.dv_stride, tile.b, tile.group, slot),
                         params.dv_stride.s, rows, call.value_head_dim, v_base + own_rows, dv,
                         kGeneral && call.dropout_threshold != 0 ? call.dropout_scale : 1.0f);
  }
}

}  // namespace gqa::cuda::sm80
