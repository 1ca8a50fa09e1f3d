// The number of parts into which a decode launch splits the keys of a tile: the rule of
// gqa_kernels/splits.py. It depends on shapes and device facts only, so that a captured CUDA graph
// stays valid.
#pragma once

#include <cstdint>

namespace gqa {

constexpr int64_t kMaxSplits = 128;
constexpr int64_t kMinBlocksPerSplit = 2;  // with fewer, a CTA takes longer to start than to run
constexpr double kFullEnough = 0.8;   // fraction of slots in use from which splitting can't pay
constexpr double kNearlyBest = 0.85;  // fraction of the best wave efficiency that is good enough

// The fraction of slots in use, over all waves, if a device runs `slots` of `programs` at once.
inline double wave_efficiency(int64_t programs, int64_t slots) {
  if (programs == 0) return 1.0;
  const int64_t waves = (programs + slots - 1) / slots;
  return static_cast<double>(programs) / static_cast<double>(slots * waves);
}

// The fewest splits whose waves are nearly as full as the fullest (an idea of FlashAttention-3,
// hopper/heuristics.h). `programs`: CTAs without splitting, of `blocks` key blocks each.
inline int64_t choose_splits(int64_t programs, int64_t blocks, int64_t slots) {
  if (static_cast<double>(programs) >= kFullEnough * static_cast<double>(slots)) return 1;
  const int64_t by_blocks = blocks / kMinBlocksPerSplit;
  const int64_t most = by_blocks < kMaxSplits ? by_blocks : kMaxSplits;
  auto blocks_per_split = [&](int64_t splits) { return (blocks + splits - 1) / splits; };
  // Skip a count that leaves each CTA as many blocks as the count before.
  auto useful = [&](int64_t splits) {
    return splits == 1 || blocks_per_split(splits) < blocks_per_split(splits - 1);
  };
  double best = 0;
  for (int64_t splits = 1; splits == 1 || splits <= most; ++splits) {
    if (!useful(splits)) continue;
    const double efficiency = wave_efficiency(programs * splits, slots);
    if (efficiency > best) best = efficiency;
  }
  for (int64_t splits = 1; splits < most; ++splits) {
    if (useful(splits) && wave_efficiency(programs * splits, slots) >= kNearlyBest * best) {
      return splits;
    }
  }
  return most > 1 ? most : 1;
}

}  // namespace gqa
