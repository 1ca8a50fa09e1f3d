// Where the results of a query token are stored, and its LSE from the state of its softmax.
#pragma once

#include <cstdint>

#include "../../core/params.h"
#include "../../core/visible.h"
#include "softmax.cuh"

namespace gqa::cuda {

// Natural-log LSE of a sum of 2^(score - shift), scores in base 2; -inf for a row without keys.
__device__ __forceinline__ float natural_lse(float shift, float sum) {
  return sum == 0.f ? minus_infinity() : (shift + __log2f(sum)) * kLn2;
}

__device__ __forceinline__ int64_t q_offset(const AttentionParams& params, const Queries& queries,
                                            int64_t head, int64_t token) {
  return queries.b * params.q_stride.b + head * params.q_stride.h +
         (queries.first + token) * params.q_stride.s;
}

__device__ __forceinline__ int64_t out_offset(const AttentionParams& params, const Queries& queries,
                                              int64_t head, int64_t token) {
  return queries.b * params.out_stride.b + head * params.out_stride.h +
         (queries.first + token) * params.out_stride.s;
}

__device__ __forceinline__ int64_t lse_offset(const AttentionParams& params, const Queries& queries,
                                              int64_t head, int64_t token) {
  return (queries.b * params.num_heads + head) * params.q_tokens + queries.first + token;
}

}  // namespace gqa::cuda
