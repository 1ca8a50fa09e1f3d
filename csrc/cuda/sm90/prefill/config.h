// Tile shapes, registers and shared memory of the Hopper prefill kernel, and what it is launched
// with. Tile shapes are FlashAttention-3's: the largest that registers and shared memory hold.
#pragma once

#include <cuda.h>

#include "../../../core/host_device.h"
#include "../../../core/params.h"
#include "../../common/page_divider.h"
#include "../scheduler.cuh"

namespace gqa::cuda::sm90 {

struct PrefillArguments {
  // [B, H, S, D] each; of packed queries B is 1, of pages of keys B is their number and S their
  // size. Boxes of 64 columns, see Config.
  CUtensorMap q, k, v, out;
  AttentionParams attention;
  Schedule schedule;
  int box_rows;  // of K and V: kBlockN, or fewer where a block of keys lies in several pages
  PageDivider by_page_size;
};

// Whether sequences lie in one storage and differ only by their first slot, as packed ones do.
GQA_HOST_DEVICE inline bool share_storage(const AttentionParams& params) {
  return params.page_table == nullptr && params.k_stride.b == 0 && params.v_stride.b == 0;
}

// A tile as the producer hands it to the consumers.
struct alignas(16) Tile {
  int head;            // query head, or kNoMoreTiles
  int sequence, row0;  // first query token of the tile among the sequence's
  int q_len;           // query tokens of the sequence
  int batch, token0;   // where the sequence's first query token is in q, out and LSE
  int k_head;          // or kInvalidHead: the map has no valid entry for the head; or kNoPage: the
                       // sequence's only page of keys is nowhere
  int length;          // keys of (batch, k_head)
  int to_position;     // token + to_position: its place among the keys
  int first_block, num_blocks;  // blocks of kBlockN keys that some row of the tile sees
  int dirty_tail;               // the last block holds slots beyond the keys: V may be NaN there
};
constexpr int kNoMoreTiles = -1, kInvalidHead = -1, kNoPage = -2;

constexpr int kStages = 2;               // K and V tiles in flight, each
constexpr int kPanelBytes = 64 * 2;      // a row of 64 columns: the span of the 128-byte swizzle
constexpr int kMaxSharedBytes = 232448;  // that a CTA may have, 227 KiB

// kHeadDim: 64, 128 or 256, no less than D and Dv; columns beyond those are zeros.
template <int kHeadDim_, int kBlockN_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kBlockN = kBlockN_;
  static constexpr int kPanels = kHeadDim / 64;

  // Warpgroup 0 produces (one warp issues TMA), each other does 64 query tokens.
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  // Consumers take turns to issue products, so that the softmax of one overlaps with products of
  // another. With head dim 256 the softmax takes a small part of the time, and turns cost more than
  // they save.
  static constexpr bool kTurns = kHeadDim <= 128;

  // Shared memory, from a base that is a multiple of 1024: Q [panel][kBlockM][64], K and V
  // [stage][panel][kBlockN][64], O like Q: in its own place where there is room, so that the next Q
  // arrives during the epilogue, otherwise in Q's. Then barriers, two tiles, head order.
  static constexpr int kQPanel = kBlockM * kPanelBytes, kKVPanel = kBlockN * kPanelBytes;
  static constexpr int kQBytes = kPanels * kQPanel, kKVBytes = kPanels * kKVPanel;
  static constexpr int kK = kQBytes, kV = kK + kStages * kKVBytes;
  static constexpr int kTilesEnd = kV + kStages * kKVBytes;
  static constexpr int kSmallBytes = 16 * (1 + 2 * kStages) + 2 * sizeof(Tile) + 2 * kMaxHeads;
  static constexpr bool kOwnO = 1024 + kTilesEnd + kQBytes + kSmallBytes <= kMaxSharedBytes;
  static constexpr int kO = kOwnO ? kTilesEnd : 0;
  static constexpr int kQRing = kTilesEnd + (kOwnO ? kQBytes : 0);
  static constexpr int kKRing = kQRing + 16, kVRing = kKRing + 16 * kStages;
  static constexpr int kTiles = kVRing + 16 * kStages, kOrder = kTiles + 2 * sizeof(Tile);
  static constexpr int kSharedBytes = 1024 + kOrder + 2 * kMaxHeads;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kQPanel % 1024 == 0 && kKVPanel % 1024 == 0, "swizzled tiles repeat every 1024");
};

}  // namespace gqa::cuda::sm90
