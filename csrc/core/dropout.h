// Which probabilities dropout keeps: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011). The result depends only on the seed and the element's position, so
// that forward, backward and every backend agree without a stored mask.
//
//   key = seed; counter = (key token / 4, query token, b * Hq + h, offset), lane = key token % 4
//   keep if lane >= floor(dropout_p * 2^32); divide what is kept by 1 - dropout_p
#pragma once

#include <cstdint>

#include "host_device.h"
#include "params.h"

namespace gqa {

constexpr int kPhiloxLanes = 4;
constexpr int kPhiloxRounds = 10;

// The seed, split into the words that the rounds use.
struct PhiloxKey {
  uint32_t low, high;

  GQA_HOST_DEVICE explicit PhiloxKey(int64_t seed)
      : low(static_cast<uint32_t>(seed)), high(static_cast<uint32_t>(seed >> 32)) {}
  GQA_HOST_DEVICE void next() {
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
};

// One round on the four words of a counter.
GQA_HOST_DEVICE inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                         const PhiloxKey& key) {
  const uint64_t x = 0xD2511F53ull * c0, y = 0xCD9E8D57ull * c2;
  c0 = static_cast<uint32_t>(y >> 32) ^ c1 ^ key.low;
  c2 = static_cast<uint32_t>(x >> 32) ^ c3 ^ key.high;
  c1 = static_cast<uint32_t>(y);
  c3 = static_cast<uint32_t>(x);
}

constexpr int kPhiloxBatch = 8;  // counters at a time, so that the compiler vectorises them

// lanes[l][i] = lane l of the counter (first + i, token, sequence_head, offset).
inline void philox_batch(int64_t seed, uint32_t first, uint32_t token, uint32_t sequence_head,
                         uint32_t offset, uint32_t (&lanes)[kPhiloxLanes][kPhiloxBatch]) {
  for (int i = 0; i < kPhiloxBatch; ++i) {
    lanes[0][i] = first + static_cast<uint32_t>(i);
    lanes[1][i] = token;
    lanes[2][i] = sequence_head;
    lanes[3][i] = offset;
  }
  PhiloxKey key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
    for (int i = 0; i < kPhiloxBatch; ++i) {
      philox_round(lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i], key);
    }
  }
}

// For keys first + i of one row, begin <= i < end: keep[i] = 1 / (1 - dropout_p) if the key is
// kept, else 0.
inline void dropout_row(const AttentionParams& params, int64_t b, int64_t head, int64_t token,
                        int64_t first, int begin, int end, float* keep) {
  const uint32_t row = static_cast<uint32_t>(b * params.num_heads + head);
  const int64_t seed = params.dropout_seed[0];
  const uint32_t offset = static_cast<uint32_t>(params.dropout_seed[1]);
  uint32_t lanes[kPhiloxLanes][kPhiloxBatch];
  for (int64_t counter = (first + begin) / kPhiloxLanes; counter * kPhiloxLanes < first + end;
       counter += kPhiloxBatch) {
    philox_batch(seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(token), row, offset,
                 lanes);
    for (int i = 0; i < kPhiloxLanes * kPhiloxBatch; ++i) {
      const int64_t key = counter * kPhiloxLanes + i - first;
      if (key < begin || key >= end) continue;
      const uint32_t random = lanes[i % kPhiloxLanes][i / kPhiloxLanes];
      keep[key] = random >= params.dropout_threshold ? params.dropout_scale : 0.0f;
    }
  }
}

}  // namespace gqa
