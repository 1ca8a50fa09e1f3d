// How many blocks of keys a part has if sequences are split by their lengths.
// benchmarks/studies/decode_balance.py has the same rule and simulates its benefit.
#pragma once

#include <cstdint>

#include "../../../core/host_device.h"
#include "../../../core/splits.h"

namespace gqa::cuda::sm80 {

// Parts for each CTA that runs at once: two of them even out the loss of rounding to whole blocks.
constexpr int64_t kPartsPerSlot = 2;

// Parts of all sequences, if none were rounded up. `tiles`: of a sequence, each a CTA of a part.
inline int64_t even_parts(int64_t tiles, int64_t slots) {
  const int64_t parts = kPartsPerSlot * slots / tiles;
  return parts < 1 ? 1 : parts;
}

// Blocks of a part. With `blocks` of all B sequences there are at most even_parts + B parts.
GQA_HOST_DEVICE inline int64_t blocks_per_part(int64_t blocks, int64_t even_parts) {
  const int64_t most = (blocks + even_parts - 1) / even_parts;
  return most < kMinBlocksPerSplit ? kMinBlocksPerSplit : most;
}

// Parts of a sequence.
GQA_HOST_DEVICE inline int64_t parts_of(int64_t blocks, int64_t blocks_per_part) {
  return blocks <= blocks_per_part ? 1 : (blocks + blocks_per_part - 1) / blocks_per_part;
}

}  // namespace gqa::cuda::sm80
