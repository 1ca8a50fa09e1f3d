// Which probabilities dropout keeps: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011), a function of the seed and the element's place alone, so that
// forward, backward and every backend agree without a stored mask.
//
//   key = seed; counter = (key token / 4, query token, b * Hq + h, offset), lane = key token % 4
//   kept where lane >= floor(dropout_p * 2^32); what is kept is divided by 1 - dropout_p
#pragma once

#include <cstdint>

#include "params.h"

namespace gqa {

constexpr int kPhiloxLanes = 4;
constexpr int kPhiloxBatch = 8;  // counters at a time: the compiler makes vectors of them

// lanes[l][i] = lane l of the counter (first + i, token, sequence_head, offset).
inline void philox_batch(uint64_t seed, uint32_t first, uint32_t token, uint32_t sequence_head,
                         uint32_t offset, uint32_t (&lanes)[kPhiloxLanes][kPhiloxBatch]) {
  for (int i = 0; i < kPhiloxBatch; ++i) {
    lanes[0][i] = first + static_cast<uint32_t>(i);
    lanes[1][i] = token;
    lanes[2][i] = sequence_head;
    lanes[3][i] = offset;
  }
  uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxBatch; ++i) {
      const uint64_t x = 0xD2511F53ull * lanes[0][i], y = 0xCD9E8D57ull * lanes[2][i];
      lanes[0][i] = static_cast<uint32_t>(y >> 32) ^ lanes[1][i] ^ key_low;
      lanes[2][i] = static_cast<uint32_t>(x >> 32) ^ lanes[3][i] ^ key_high;
      lanes[1][i] = static_cast<uint32_t>(y);
      lanes[3][i] = static_cast<uint32_t>(x);
    }
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
}

// keep[i] for the keys first + i, begin <= i < end, of one row: 1 / (1 - dropout_p)
// where it is kept, else 0.
inline void dropout_row(const AttentionParams& params, int64_t b, int64_t head, int64_t token,
                        int64_t first, int begin, int end, float* keep) {
  const uint32_t row = static_cast<uint32_t>(b * params.num_heads + head);
  uint32_t lanes[kPhiloxLanes][kPhiloxBatch];
  for (int64_t counter = (first + begin) / kPhiloxLanes; counter * kPhiloxLanes < first + end;
       counter += kPhiloxBatch) {
    philox_batch(params.dropout_seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(token),
                 row, params.dropout_offset, lanes);
    for (int i = 0; i < kPhiloxLanes * kPhiloxBatch; ++i) {
      const int64_t key = counter * kPhiloxLanes + i - first;
      if (key < begin || key >= end) continue;
      const uint32_t random = lanes[i % kPhiloxLanes][i / kPhiloxLanes];
      keep[key] = random >= params.dropout_threshold ? params.dropout_scale : 0.0f;
    }
  }
}

}  // namespace gqa
