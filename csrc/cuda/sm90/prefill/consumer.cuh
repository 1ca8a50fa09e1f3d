// A consumer warpgroup of the Hopper prefill kernel: 64 query tokens of each tile.
//
// For block n of the keys it issues Q K^T of block n, then P V of block n - 1, and does the softmax
// of block n while P V runs. O is rescaled only where a row's maximum moved. Between its products a
// consumer hands the turn to the next one, so that its softmax also meets their products.
#pragma once

#include "../wgmma.cuh"
#include "epilogue.cuh"

namespace gqa::cuda::sm90 {

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1, kEpilogueBarrier = 4;  // + consumer
constexpr int kTailBarrier = 7;

// Slots beyond the keys may hold any value, including NaN, and 0 * NaN is NaN. So V's rows there
// are set to 0. All consumers share this work and wait for one another.
template <class C>
__device__ __forceinline__ void clear_tail(uint32_t v_tile, int valid_rows) {
  constexpr int kChunks = kPanelBytes / 16;
  const int thread = threadIdx.x - 128;
  for (int i = valid_rows * kChunks + thread; i < C::kBlockN * kChunks; i += C::kThreads - 128) {
#pragma unroll
    for (int c = 0; c < C::kPanels; c++) {
      st_shared_v4(v_tile + c * C::kKVPanel + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
  fence_async_proxy();
  named_barrier_sync(kTailBarrier, C::kThreads - 128);
}

// kScoreMods: softcap, ALiBi, attn_mask, a scale that is not positive.
template <class T, class C, bool kScoreMods>
__device__ __forceinline__ void consume(const PrefillArguments& arguments, uint32_t base,
                                        const Tile* tiles) {
  constexpr int kBlockN = C::kBlockN;
  const AttentionParams& params = arguments.attention;
  const Ring<1> q_ring{base + C::kQRing};
  const Ring<kStages> k_ring{base + C::kKRing}, v_ring{base + C::kVRing};
  const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // uniform to the compiler too
  const int lane = threadIdx.x % 32;
  const int next = consumer + 1 == C::kConsumers ? 0 : consumer + 1;
  const float factor = kScoreMods ? 1.0f : params.scale * kLog2e;
  const uint64_t q_operand = swizzled_operand(base + consumer * 64 * kPanelBytes, 0, 1024);
  const uint64_t k_operand = swizzled_operand(base + C::kK, 0, 1024);
  const uint64_t v_operand = swizzled_operand(base + C::kV, C::kKVPanel, 1024);

  float o[C::kHeadDim / 2], s[kBlockN / 2];
  uint32_t p[kBlockN / 4];  // s as the A operand of P V

  auto issue_qk = [&](int n) {  // s = Q K^T
    pin(s);
    wgmma_fence();
    const uint64_t k = advance(k_operand, k_ring.stage(n) * C::kKVBytes);
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 16; i++) {
      Wgmma<T, kBlockN>::ss(s, advance(q_operand, i / 4 * C::kQPanel + i % 4 * 32),
                            advance(k, i / 4 * C::kKVPanel + i % 4 * 32), i != 0);
    }
    wgmma_commit();
  };
  auto issue_pv = [&](int n) {  // o += P V
    pin(o);
    pin(p);
    wgmma_fence();
    const uint64_t v = advance(v_operand, v_ring.stage(n) * C::kKVBytes);
#pragma unroll
    for (int i = 0; i < kBlockN / 16; i++) {
      Wgmma<T, C::kHeadDim>::rs(o, p + 4 * i, advance(v, i * 16 * kPanelBytes), true);
    }
    wgmma_commit();
  };
  auto pack_p = [&] {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; i++) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  };
  // After this warp's products have read a buffer.
  auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  auto take_turn = [&] {
    if constexpr (C::kTurns) named_barrier_sync(kTurnBarrier + consumer, 256);
  };
  auto pass_turn = [&] {
    if constexpr (C::kTurns) named_barrier_arrive(kTurnBarrier + next, 256);
  };

  if (next == 0) pass_turn();  // the first turn is consumer 0's
  int blocks_before = 0;       // K (and V) blocks of earlier tiles
#pragma unroll 1
  for (int round = 0;; round++) {
    q_ring.wait_full(round);
    const Tile tile = tiles[round % 2];
    if (tile.head == kNoMoreTiles) break;

    const int row0 = tile.row0 + 64 * consumer;  // the consumer's first token
    Rows rows;
    rows.batch = tile.batch;
    rows.head = tile.head;
    rows.token = row0 + threadIdx.x / 32 % 4 * 16 + lane / 4;
    rows.q_len = tile.q_len;
    rows.token0 = tile.token0;
    rows.length = tile.length;
    rows.position = rows.token + tile.to_position;
    rows.slope = 0.0f;
    if (kScoreMods && params.alibi_slopes != nullptr) {
      rows.slope = kLog2e * params.alibi_slopes[tile.sequence * params.alibi_stride_b +
                                                tile.head * params.alibi_stride_h];
    }
    // All 64 rows see keys [seen_begin, seen_end).
    const int seen_begin =
        static_cast<int>(keys_around(params, tile.length, row0 + 63 + tile.to_position).begin);
    const int seen_end =
        static_cast<int>(keys_around(params, tile.length, row0 + tile.to_position).end);

    OnlineSoftmax softmax;
    float rescale[2];
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; i++) o[i] = 0.0f;

    // Scores and probabilities of a block of keys, from its products.
    auto soften = [&](int block) {
      const int key0 = block * kBlockN;
      if constexpr (kScoreMods) modify_scores<T, kBlockN>(s, params, rows, key0);
      const bool ends = key0 + kBlockN > seen_end, begins = key0 < seen_begin;
      if (ends || begins) hide_keys<kBlockN>(s, params, rows, key0, ends, begins);
      softmax.update(s, factor, rescale);
    };

    if (tile.num_blocks > 0) {
      const int last_block = tile.first_block + tile.num_blocks - 1;
      int n = blocks_before;
      k_ring.wait_full(n);
      issue_qk(n);
      wgmma_wait<0>();
      pin(s);
      release(k_ring.empty(n));
      soften(last_block);
      pack_p();
      v_ring.wait_full(n);
      if (tile.dirty_tail) {
        clear_tail<C>(base + C::kV + v_ring.stage(n) * C::kKVBytes,
                      max(0, tile.length - last_block * kBlockN));
      }

#pragma unroll 1
      for (int block = last_block - 1; block >= tile.first_block; block--) {
        n++;
        k_ring.wait_full(n);
        take_turn();
        issue_qk(n);
        issue_pv(n - 1);
        pass_turn();
        wgmma_wait<1>();
        pin(s);
        release(k_ring.empty(n));
        soften(block);
        // Nothing else makes ptxas leave the wait for P V below the softmax that should overlap
        // with it: it hoists the wait. So the code waits here for V of the next product, in a loop
        // whose condition depends on the sums (never negative). ptxas does not move the wait across
        // that loop.
        v_ring.wait_full(n, fminf(softmax.sum[0], softmax.sum[1]) < 0.0f);
        wgmma_wait<0>();
        pin(o);
        release(v_ring.empty(n - 1));
        if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= rescale[i / 2 % 2];
        }
        pack_p();
      }

      if constexpr (C::kOwnO) release(q_ring.empty(round));  // the last Q K^T is done
      issue_pv(n);
      wgmma_wait<0>();
      pin(o);
      release(v_ring.empty(n));
      blocks_before += tile.num_blocks;
    } else if constexpr (C::kOwnO) {
      __syncwarp();  // every lane has read the tile
      release(q_ring.empty(round));
    }

    float inverse[2];
    finish_rows(params, tile.k_head, rows, softmax, factor, inverse);
    store_output<T, C>(arguments, rows, row0, o, inverse, base, consumer,
                       kEpilogueBarrier + consumer);
    if constexpr (!C::kOwnO) {
      if (threadIdx.x % 128 == 0) {
        tma_store_wait_read();
        mbarrier_arrive(q_ring.empty(round));
      }
    }
  }
  if (consumer == 0) take_turn();  // the last turn: no arrival is left behind
  if (threadIdx.x % 128 == 0) tma_store_wait();
}

}  // namespace gqa::cuda::sm90
