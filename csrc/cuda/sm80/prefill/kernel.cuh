// Prefill for sm_80 and later, after FlashAttention-2 (Dao 2023, algorithm 1): mma.sync, cp.async,
// online softmax.
//
// Grid      one CTA for each (block of kBlockM query tokens, query head, sequence): query_tile.cuh.
// CTA       loops over the keys that its rows see, kBlockN at a time. The head map only selects the
//           head of K (and V), so uneven groups cost what even ones do.
// Warp      kWarpRows rows of the tile, all keys: S, P and O stay in its registers, and P is the
//           first operand of the second product as it comes out of the first.
// Shared    Q, and a ring of three slots for K and V; see config.h. A tile is requested two
//           products before it is used, behind the barrier that says its slot was read. Quantised
//           ones arrive in slot 0, as they are stored, and are widened to slots 1 and 2.
// Masks     causal order and windows only cost time in the blocks at the edge. kGeneral has the
//           code for softcap, ALiBi, masks, scales <= 0, dropout and element-wise copies; the other
//           kernel has neither their branches nor their registers.
// Softmax   base 2, fp32. O is rescaled only where a row's maximum has grown by more than 2^8 since
//           it last was: P <= 2^8 is as exact as P <= 1, and later maxima grow little
//           (FlashAttention-4's rule).
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/copy_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../products.cuh"
#include "../query_tile.cuh"
#include "../shared_tile.cuh"
#include "args.h"
#include "config.h"
#include "load.cuh"
#include "quantized.cuh"
#include "scores.cuh"
#include "store.cuh"

namespace gqa::cuda::sm80 {

// Q as the first operand, where it stays in registers.
template <class C>
using QFragments = uint32_t[C::kQInRegisters ? C::kD / 16 : 1][C::kRowTiles][4];

template <class T, class C, bool kGeneral, bool kPaged>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    prefill_sm80_kernel(const __grid_constant__ PrefillArgs args) {
  const AttentionParams& params = args.params;
  extern __shared__ __align__(128) uint8_t shared[];
  // Used only a few times per block of keys, so these are not worth registers.
  __shared__ QueryTile tile;
  __shared__ TokenRange warp_keys[C::kWarps];
  __shared__ KVRows<T, C> k_rows, v_rows;
  __shared__ WarpPages<C> warp_pages[kPaged ? C::kWarps : 1];
  __shared__ float k_scales[C::kQuantized ? C::kBlockN : 1];
  __shared__ int end_key;

  // Caches have no dropout, and only caches are quantised.
  const bool drops = kGeneral && !C::kQuantized && params.dropout_threshold != 0;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t base = smem_u32(shared);
  const uint32_t q_base = base + C::kQOffset, ring = base + C::kRingOffset;
  int first_key;
  {
    const QueryTile t =
        find_query_tile<C>(params, args.section_pairs, reinterpret_cast<int*>(shared));
    if (t.token >= t.q_len) return;
    const TokenRange keys = token_range(params, t.length, t.q_len, t.token, C::kBlockM);
    first_key = max(0, keys.begin) / C::kBlockN * C::kBlockN;
    if (!t.valid || first_key >= keys.end) {
      const float value = t.valid ? 0.0f : not_a_number();
      fill_tile<T, C>(args, t, value, t.valid ? minus_infinity() : value);
      return;
    }
    if (threadIdx.x == 0) {
      tile = t;
      end_key = keys.end;
      if constexpr (C::kQuantized) {
        k_rows = quantized_rows<true>(params, args.by_page_size, t.b, t.k_head, t.v_head);
        v_rows = quantized_rows<false>(params, args.by_page_size, t.b, t.k_head, t.v_head);
      } else {
        k_rows = row_origin<T>(params, params.k, params.k_stride, t.b, t.k_head, t.k_head);
        v_rows = row_origin<T>(params, params.v, params.v_stride, t.b, t.k_head, t.v_head);
      }
    }
    if (threadIdx.x % 32 == 0) {
      warp_keys[warp] =
          token_range(params, t.length, t.q_len, t.token + warp * C::kWarpRows, C::kWarpRows);
    }
    load_q<T, C, kGeneral>(args, t, q_base);
    __syncthreads();  // tile, rows, keys
  }
  // Quantised tiles arrive here.
  const uint32_t staged_k = ring, staged_v = ring + C::kSlotBytes / 2;
  using QuantizedK = QuantizedTiles<C, true>;
  using QuantizedV = QuantizedTiles<C, false>;
  WarpPages<C>& pages = warp_pages[kPaged ? warp : 0];
  // Starts the copy of a tile, if there is one. Commits a group in any case, because waits count
  // groups.
  const auto load_k = [&](int key, uint32_t to) {
    if (key < end_key) {
      if constexpr (C::kQuantized) {
        QuantizedK::request(args, k_rows, key, tile.length, staged_k);
      } else {
        if constexpr (kPaged) pages.look_up(args, k_rows, key, tile.length);
        load_tile<C, true, kGeneral, kPaged>(args, k_rows, pages, key, tile.length, to);
      }
    }
    cp_async_commit();
  };
  const auto load_v = [&](int key, uint32_t to) {
    if (key < end_key) {
      if constexpr (C::kQuantized) {
        QuantizedV::request(args, v_rows, key, tile.length, staged_v);
      } else {
        load_tile<C, false, kGeneral, kPaged>(args, v_rows, pages, key, tile.length, to);
      }
    }
    cp_async_commit();
  };
  if constexpr (kPaged) pages.begin(args, k_rows, first_key, tile.length);
  load_k(first_key, ring);
  if constexpr (!C::kQInRegisters) load_v(first_key, ring + C::kSlotBytes);

  const LaneOffsets<C> offsets;
  QFragments<C> q;
  if constexpr (C::kQInRegisters) {
    cp_async_wait<0>();
    __syncthreads();  // Q
    const TileFragments q_tile(q_base + warp * C::kWarpRows * C::kRowBytes, offsets.qv);
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
        ldmatrix_x4(q[step][m], q_tile.address<C>(m * 16, step));
    }
    __syncthreads();  // Q is read: V may take its place
    load_v(first_key, ring + C::kSlotBytes);
  }

  RowState<C> state;
  Output<C> output = {};
  uint32_t slot = C::kQuantized ? ring + C::kSlotBytes : ring;  // of K; V is in the one after
  while (true) {
    cp_async_wait<1>();
    if constexpr (C::kQuantized) {
      QuantizedK::template widen<T>(args, k_rows, first_key, tile.length, staged_k, slot, k_scales);
      load_k(first_key + C::kBlockN, 0);
    }
    __syncthreads();  // K; and every warp is done with the V before it
    if constexpr (!C::kQuantized) {
      load_k(first_key + C::kBlockN, slot_before<C>(slot, ring));
    }
    const TokenRange keys = warp_keys[warp];
    const bool seen = first_key < keys.end && first_key + C::kBlockN > keys.begin;
    Probabilities<C> p;
    if (seen) {
      Scores<C> scores;
      const TileFragments q_tile(q_base + warp * C::kWarpRows * C::kRowBytes, offsets.qv);
      const auto load_rows = [&](uint32_t (&a)[4], int m, int step) {
        if constexpr (C::kQInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = q[step][m][i];
        } else {
          ldmatrix_x4(a, q_tile.address<C>(m * 16, step));
        }
      };
      multiply_rows<T, C>(scores, load_rows, TileFragments(slot, offsets.k));
      if constexpr (C::kQuantized) scale_keys<C>(scores, smem_u32(k_scales));
      const int warp_token = tile.token + warp * C::kWarpRows;
      if constexpr (kGeneral) modify_scores<T, C>(scores, args, tile, warp_token, first_key);
      if (first_key < keys.all_begin || first_key + C::kBlockN > keys.all_end) {
        hide_keys<C>(scores, params, tile.length, tile.q_len, warp_token, first_key);
      }
      state.template update<T>(p, scores, output, args.softmax_scale);
      // The sum is of all probabilities; those that are kept are scaled with the output.
      if (drops) drop_keys<C>(p, params, tile, warp_token, first_key);
    }
    cp_async_wait<1>();
    if constexpr (C::kQuantized) {
      QuantizedV::template widen<T>(args, v_rows, first_key, tile.length, staged_v,
                                    slot_after<C>(slot, ring), nullptr);
      load_v(first_key + C::kBlockN, 0);
    }
    __syncthreads();  // V; and every warp is done with K
    if constexpr (!C::kQuantized) load_v(first_key + C::kBlockN, slot);
    if (seen) {
      add_weighted_rows<T, C>(output, p, TileFragments(slot_after<C>(slot, ring), offsets.qv));
    }
    first_key += C::kBlockN;
    if (first_key >= end_key) break;
    if constexpr (!C::kQuantized) {
      forget_derived(slot);  // slot_before is computed again, and not kept during the step
      slot = slot_before<C>(slot, ring);
    }
  }
  store_output<T, C>(args, tile, base, warp * C::kWarpRows, state, output,
                     drops ? params.dropout_scale : 1.0f);
}

}  // namespace gqa::cuda::sm80
