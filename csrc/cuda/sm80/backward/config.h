// Tile shapes of the sm_80 backward kernels, one set per head-dim class.
#pragma once

#include <cstdint>

#include "../../../core/params.h"

namespace gqa::cuda::sm80 {

// kD: the class, at least as wide as the head dims of q, k and v; the rest is zeros.
//
// Both kernels have one shape. A CTA owns kBlockM rows of two tensors, whose gradients it sums:
// keys (rows of K and V) or query tokens (rows of Q and dO). It walks over the rows of the other
// two, kBlockN at a time. A warp owns kWarpRows rows. Two row tiles use every fragment of the
// walked tiles twice; from 128 on the accumulators leave room for one only, at 256 for those of dK
// or dV only, which two launches then sum.
//
// class | accumulators: dK, dV | S, dP | shared bytes | CTAs per SM (A100; with 100 KB per SM: 1)
//    64 |              64 + 64 | 32+32 |       49,664 | 2
//   128 |              64 + 64 | 16+16 |       98,816 | 1
//   256 |                  128 |   8+8 |       98,560 | 1
template <int kHeadDim>
struct BackwardConfig {
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  static constexpr int kD = kHeadDim;
  static constexpr int kWarps = kD == 128 ? 8 : 4;
  static constexpr int kRowTiles = kD == 64 ? 2 : 1;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kBlockM = kWarps * kWarpRows;   // rows that a CTA owns
  static constexpr int kBlockN = kD == 256 ? 16 : 32;  // rows of a step
  static constexpr int kMinCtas = kD == 64 ? 2 : 1;    // per SM, for the registers
  static constexpr bool kBothGradients = kD != 256;    // dK and dV in one launch
  // Of the kernel for dQ, which has fewer accumulators: Q and dO stay in registers. Else a warp of
  // one row tile would read them again for every step, and shared memory be the limit.
  static constexpr bool kOwnInRegisters = kD == 128;

  // Shared memory: the two owned tiles; two slots, each for a pair of walked tiles and, where these
  // are of query tokens, their numbers (RowNumbers). Rows lie as shared_tile.cuh says.
  static constexpr int kRowBytes = kD * 2;
  static constexpr int kOwnBytes = kBlockM * kRowBytes;
  static constexpr int kStepBytes = kBlockN * kRowBytes;
  static constexpr int kNumbersOffset = 2 * kStepBytes;  // in a slot
  static constexpr int kSlotBytes = 2 * kStepBytes + kBlockN * 8;
  static constexpr int kRingOffset = 2 * kOwnBytes;
  static constexpr int kSharedBytes = kRingOffset + 2 * kSlotBytes;

  static constexpr int kChunks = kD / 8;                // 16-byte chunks of a row
  static constexpr int kCopyRows = kThreads / kChunks;  // rows that all threads copy at once
  static_assert(kCopyRows >= 4 && kBlockN % kCopyRows == 0);
};

}  // namespace gqa::cuda::sm80
