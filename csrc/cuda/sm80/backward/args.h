// The arguments of the backward kernels.
#pragma once

#include <cstdint>

#include "../../../core/backward_params.h"
#include "../../../core/visible.h"
#include "../../common/group_rows.cuh"

namespace gqa::cuda::sm80 {

constexpr int kMaxBackwardHeads = 8192;  // their numbers fit into the shared memory of every class
constexpr int kNumbersBlock = 32;        // rows of numbers are padded to whole blocks

// What a query row of a head contributes to the gradient of a score, P * (dP - delta): its LSE in
// base-2 units, and delta = rowsum(dO * out) - dLSE. A row that sees no key, or is padding, has an
// LSE of +inf, so that P is 0, and a delta of 0.
struct alignas(8) RowNumbers {
  float lse, delta;
};

// What rows of a head add to the gradients of its ALiBi slope and its sink.
struct HeadSums {
  float slope, sink;
};

struct BackwardArgs {
  BackwardParams params;
  RowNumbers* numbers;    // [B, Hq, padded_len]; packed sequences: [Hq, padded_len]
  int64_t padded_len;     // Sq, or the tokens of all sequences, in whole blocks
  int64_t number_blocks;  // of a sequence's tokens, at most
  HeadSums* head_sums;    // [B, Hq, sum_blocks]: of a CTA of the kernel for dQ each; or nullptr
  int64_t sum_blocks;     // CTAs that the kernel for dQ has for each query head
  float softmax_scale;    // from dot products to base-2 scores
  bool elements;  // rows of q, k, v or dO are not whole 16-byte chunks; the general kernels only
  bool out_elements;  // likewise of out or dO
  int section_pairs;  // see query_tile.cuh
  // Of the kernel for dK and dV, which sums what is not nullptr:
  bool by_value;  // a CTA's group are the query heads of a value head, not of a key head
  bool shared;    // these read one head of the other tensor, too
};

// Where the numbers of a sequence's tokens begin, for query head 0; the next head's follow
// padded_len later. Packed sequences follow one another in whole blocks. With one more block for
// each of them, rounding down leaves enough room to round their lengths up.
GQA_HOST_DEVICE inline int64_t first_numbers(const BackwardArgs& args, int64_t b) {
  const AttentionParams& call = args.params.call;
  if (call.q_offsets == nullptr) return b * call.num_heads * args.padded_len;
  return (call.q_offsets[b] / kNumbersBlock + b) * kNumbersBlock;
}

}  // namespace gqa::cuda::sm80
