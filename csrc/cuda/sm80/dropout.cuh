// Which probabilities dropout keeps (core/dropout.h), for scores in a warp's registers.
//
// A Philox counter has the words of four keys of one token, which lie in neighbouring lanes, each
// of which needs as many counters. The lanes divide the counters among themselves and exchange the
// resulting keep bits by shuffle: no word is computed twice, for one or two shuffles a row.
#pragma once

#include <cstdint>

#include "../../core/dropout.h"
#include "../../core/params.h"

namespace gqa::cuda::sm80 {

// The number of a head's rows in counters.
__device__ __forceinline__ uint32_t dropout_head(const AttentionParams& params, int b, int head) {
  return static_cast<uint32_t>(b) * static_cast<uint32_t>(params.num_heads) + head;
}

// kept[i], bit l: whether the probability of token[i] and key 4 * four[i] + l is kept. Rounds stay a
// loop: the counters beside each other keep the multipliers busy, and code and compile time are a
// tenth.
template <int kCounters>
__device__ __forceinline__ void kept_of_fours(const AttentionParams& params, uint32_t head,
                                              const uint32_t (&token)[kCounters],
                                              const uint32_t (&four)[kCounters],
                                              uint32_t (&kept)[kCounters]) {
  PhiloxKey key(params.dropout_seed[0]);
  uint32_t words[kCounters][kPhiloxLanes];
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    words[i][0] = four[i];
    words[i][1] = token[i];
    words[i][2] = head;
    words[i][3] = static_cast<uint32_t>(params.dropout_seed[1]);
  }
#pragma unroll 1
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      philox_round(words[i][0], words[i][1], words[i][2], words[i][3], key);
    }
  }
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    kept[i] = 0;
#pragma unroll
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      kept[i] |= static_cast<uint32_t>(words[i][lane] >= params.dropout_threshold) << lane;
    }
  }
}

// What is kept of a lane's row of a tile whose rows are tokens and whose columns are keys.
template <class C>
struct KeptKeys {
  uint32_t bits[2];  // of n % 2: element (n, e) is bit n / 2 * 4 + e

  __device__ __forceinline__ bool at(int n, int e) const {
    return bits[n % 2] >> (n / 2 * 4 + e) & 1;
  }
};

// By the whole warp. `first_key` is a multiple of 4.
template <class C>
__device__ __forceinline__ KeptKeys<C> kept_keys(const AttentionParams& params, uint32_t head,
                                                 uint32_t token, uint32_t first_key) {
  // Two lanes have the keys of a counter: the first takes those of even n, the other of odd n.
  constexpr int kCounters = C::kBlockN / 16;
  const uint32_t lane = threadIdx.x % 32, odd = lane % 2;
  uint32_t tokens[kCounters], fours[kCounters], kept[kCounters], mine = 0;
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    tokens[i] = token;
    fours[i] = first_key / 4 + (i * 2 + odd) * 2 + lane % 4 / 2;
  }
  kept_of_fours(params, head, tokens, fours, kept);
#pragma unroll
  for (int i = 0; i < kCounters; ++i) mine |= kept[i] << (i * 4);
  const uint32_t others = __shfl_xor_sync(~0u, mine, 1);
  return {{(odd ? others : mine) >> (odd * 2), (odd ? mine : others) >> (odd * 2)}};
}

// The same of a tile whose rows are keys and whose columns are tokens.
template <class C>
struct KeptTokens {
  uint32_t bits;  // element (n, e) is bit (n * 2 + e) * 4

  __device__ __forceinline__ bool at(int n, int e) const { return bits >> ((n * 2 + e) * 4) & 1; }
};

template <class C>
__device__ __forceinline__ KeptTokens<C> kept_tokens(const AttentionParams& params, uint32_t head,
                                                     uint32_t first_token, uint32_t key) {
  // Four lanes have the keys of a counter, and the same tokens: each takes a fourth of them.
  constexpr int kCounters = C::kBlockN / 16;
  static_assert(kCounters * 4 * 4 <= 32, "a bit for each key of each token");
  const uint32_t lane = threadIdx.x % 32, place = lane / 4 % 4;
  uint32_t tokens[kCounters], fours[kCounters], kept[kCounters], found = 0;
#pragma unroll
  for (int i = 0; i < kCounters; ++i) {
    const uint32_t column = i * 4 + place;
    tokens[i] = first_token + column / 2 * 8 + lane % 4 * 2 + column % 2;
    fours[i] = key / 4;
  }
  kept_of_fours(params, head, tokens, fours, kept);
#pragma unroll
  for (int i = 0; i < kCounters; ++i) found |= kept[i] << ((i * 4 + place) * 4);
  found |= __shfl_xor_sync(~0u, found, 4);
  found |= __shfl_xor_sync(~0u, found, 8);
  return {found >> place};
}

}  // namespace gqa::cuda::sm80
