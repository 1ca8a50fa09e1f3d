// Tile shapes of the sm_80 prefill kernels, one set per head-dim class, and another for quantised K
// and V.
#pragma once

#include <cstdint>

namespace gqa::cuda::sm80 {

// kD: the class, at least as wide as the head dims of q, k and v; the rest is zeros.
//
// A warp has kRowTiles x 16 query rows. Two row tiles use every fragment of K and V twice, which
// halves the shared-memory reads per tensor-core product: with one, reads would take as long as the
// products. At 256 the accumulators leave room for one only, and Q moves to registers instead.
//
// class | registers: O, S; Q | shared bytes | CTAs per SM (A100, H100)
//    64 |        64, 64;   - |       40,960 | 3
//   128 |       128, 64;   - |       81,920 | 2
//   256 |       128, 16;  64 |       81,920 | 1
// Quantised K and V:
//    64 |        64, 64;   - |       40,960 | 2
//   128 |       128, 32;   - |       57,344 | 2
//   256 |       128, 16;  64 |       81,920 | 1
template <int kHeadDim, int kKeys>
struct PrefillShape {
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256);
  static constexpr int kD = kHeadDim;
  static constexpr int kWarps = kD == 256 ? 8 : 4;
  static constexpr int kRowTiles = kD == 256 ? 1 : 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kBlockM = kWarps * kWarpRows;  // query rows of a CTA
  static constexpr int kBlockN = kKeys;               // keys of a step
  static constexpr bool kQInRegisters = kD == 256;
  static constexpr int kMinCtas = kD == 256 ? 1 : kD == 64 ? 3 : 2;  // per SM, for the registers

  // Shared memory: rows of kD elements whose 16-byte chunks are permuted by chunk ^ (row % 8), so
  // that the eight rows an ldmatrix reads at one chunk lie in eight different banks of 16 bytes.
  // Three slots that tiles of K and V take in turn: K0 V0 K1 | V1 K2 V2 | ...
  // Q has a place of its own, or, where it goes to registers, lies over slots 1 and up at first.
  static constexpr int kRowBytes = kD * 2;
  static constexpr int kSlots = 3;
  static constexpr int kSlotBytes = kBlockN * kRowBytes;
  static constexpr int kQBytes = kBlockM * kRowBytes;
  static constexpr int kRingOffset = kQInRegisters ? 0 : kQBytes;
  static constexpr int kQOffset = kQInRegisters ? kSlotBytes : 0;
  static constexpr int kRingEnd = kRingOffset + kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kQOffset + kQBytes > kRingEnd ? kQOffset + kQBytes : kRingEnd;
  static_assert(kSharedBytes >= kQBytes, "the output is staged in the same memory");

  static constexpr int kChunks = kD / 8;                // 16-byte chunks of a row
  static constexpr int kCopyRows = kThreads / kChunks;  // rows that all threads copy at once
  static_assert(kCopyRows % 8 == 0 && kBlockN % kCopyRows == 0);
};

template <int kHeadDim>
struct PrefillConfig : PrefillShape<kHeadDim, kHeadDim == 256 ? 32 : 64> {
  static constexpr bool kQuantized = false;  // K and V have q's type
};

// For quantised K and V: both arrive in slot 0 of the ring, half of it each. Slot 1 holds the
// dequantised K and slot 2 the dequantised V. Dequantising takes registers, which become free with
// fewer keys per step, or with fewer CTAs.
template <int kHeadDim>
struct QuantizedPrefillConfig : PrefillShape<kHeadDim, kHeadDim == 64 ? 64 : 32> {
  static constexpr bool kQuantized = true;
  static constexpr int kMinCtas = kHeadDim == 256 ? 1 : 2;
};

}  // namespace gqa::cuda::sm80
