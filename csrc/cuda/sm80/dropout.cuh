// Which probabilities dropout keeps (core/dropout.h), for scores as they lie in a warp's registers.
//
// A Philox counter has the words of four keys of one token, which lie in neighbouring lanes, each of
// which needs as many counters. So these lanes share the counters out and tell each other what they
// found as bits: no word is computed twice, and it takes one or two shuffles a row.
#pragma once

#include <cstdint>

#include "../../core/dropout.h"
#include "../../core/params.h"

namespace gqa::cuda::sm80 {

// The number of a head's rows in counters.
__device__ __forceinline__ uint32_t dropout_head(const AttentionParams& params, int b, int head) {
  return static_cast<uint32_t>(b) * static_cast<uint32_t>(params.num_heads) + head;
}

// Bits 0 to 3: whether a token's probabilities of keys 4 * four to 4 * four + 3 are kept.
__device__ __forceinline__ uint32_t kept_of_four(const AttentionParams& params, uint32_t head,
                                                 uint32_t token, uint32_t four) {
  PhiloxKey key(params.dropout_seed[0]);
  uint32_t words[kPhiloxLanes] = {four, token, head, static_cast<uint32_t>(params.dropout_seed[1])};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
    philox_round(words[0], words[1], words[2], words[3], key);
  }
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < kPhiloxLanes; ++i) {
    kept |= static_cast<uint32_t>(words[i] >= params.dropout_threshold) << i;
  }
  return kept;
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
  const uint32_t lane = threadIdx.x % 32, odd = lane % 2;
  uint32_t mine = 0;
#pragma unroll
  for (int n = 0; n < C::kBlockN / 8; n += 2) {
    const uint32_t four = first_key / 4 + (n + odd) * 2 + lane % 4 / 2;
    mine |= kept_of_four(params, head, token, four) << (n / 2 * 4);
  }
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
  constexpr int kTokens = C::kBlockN / 4;  // of a lane
  static_assert(kTokens % 4 == 0 && kTokens <= 8, "each has four bits");
  // Four lanes have the keys of a counter, and the same tokens: each takes a fourth of them.
  const uint32_t lane = threadIdx.x % 32, place = lane / 4 % 4;
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kTokens; i += 4) {
    const uint32_t column = i + place;
    const uint32_t token = first_token + column / 2 * 8 + lane % 4 * 2 + column % 2;
    found |= kept_of_four(params, head, token, key / 4) << (column * 4);
  }
  found |= __shfl_xor_sync(~0u, found, 4);
  found |= __shfl_xor_sync(~0u, found, 8);
  return {found >> place};
}

}  // namespace gqa::cuda::sm80
