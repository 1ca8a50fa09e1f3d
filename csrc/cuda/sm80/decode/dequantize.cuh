// Turns products of stored numbers into products of values, by the scale and zero of each key.
//
//   q . (scale * (k - zero)) = scale * (q . k - zero * sum(q))
//   p * scale * (v - zero)   = (p * scale) * v - (p * scale) * zero
//
// Both products run in fp16 (stored_numbers.cuh). Each row of q is scaled to the range of fp16 by a
// power of two. The running maximum keeps p * scale in that range: it is the maximum of score +
// log2(scale of V), and so bounds p * scale for any scales.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/copy_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/stored_numbers.cuh"
#include "config.h"

namespace gqa::cuda::sm80 {

// The largest p * scale; far above 1, so that small ones are not subnormal in fp16.
constexpr float kLargestWeight = 32768.0f;
// Lower bound of log2(scale of V), so that p does not overflow if scales are 0.
constexpr float kLeastLog2Scale = -64.0f;

// Copies scales and zeros of one warp's keys to a stage: fp32 [K scales | K zeros | V scales | V
// zeros], 16 each. Lane l copies a scale (from lane 16 on a zero) of key l % 16. A key without a
// page has scale and zero NaN for K, and 0 for V.
struct NumberLoader {
  // In shared memory, because registers are scarce: scales and zeros of K and V.
  using Rows = CopyRows<float>[2][2];
  const Rows& rows;
  int limit;  // no key from here on is read

  // `rows` is written here and can be read after a barrier.
  __device__ __forceinline__ NumberLoader(const AttentionParams& params, PageDivider by_page_size,
                                          int b, int k_head, int v_head, int limit, Rows& rows)
      : rows(rows), limit(limit) {
    if (threadIdx.x < 2) {
      const bool keys = threadIdx.x == 0;
      const int head = keys ? k_head : v_head;
      rows[threadIdx.x][0] = scale_rows(params, by_page_size, keys, b, k_head, head);
      rows[threadIdx.x][1] = zero_rows(params, by_page_size, keys, b, k_head, head);
    }
  }

  __device__ __forceinline__ void load(int first, uint32_t page, uint32_t dst) const {
    const int lane = threadIdx.x & 31, mine = first + (lane & 15), zeros = lane >> 4;
    const bool there = mine < limit;
    const float* k_at = there ? rows[0][zeros].key_row(mine, page) : nullptr;
    const float* v_at = there ? rows[1][zeros].row(mine, page) : nullptr;
    cp_async_small<4>(dst + lane * 4, k_at, k_at == nullptr ? 0 : 4);
    cp_async_small<4>(dst + 128 + lane * 4, v_at, v_at == nullptr ? 0 : 4);
  }
};

// Replaces NumberLoader if K and V have q's type.
struct NoNumbers {
  struct Rows {};
  __device__ __forceinline__ NoNumbers(const AttentionParams&, PageDivider, int, int, int, int,
                                       Rows&) {}
  __device__ __forceinline__ void load(int, uint32_t, uint32_t) const {}
};

// Scales and zeros of the four keys whose scores a lane holds, in the order of its accumulators.
struct LaneNumbers {
  float k_scale[4], k_zero[4], v_scale[4], v_zero[4];

  // From a stage. Zeros that are none are left out.
  template <class S>
  __device__ __forceinline__ void load(const AttentionParams& params, uint32_t numbers) {
    using Numbers = StoredNumbers<S>;
    constexpr float kInversePart = 1.0f / Numbers::kPart;
    load_four(k_scale, numbers);
    load_four(v_scale, numbers + 128);
#pragma unroll
    for (float& x : k_scale) x *= Numbers::kPart;
    if (params.k_zero != nullptr) {
      load_four(k_zero, numbers + 64);
#pragma unroll
      for (float& x : k_zero) x = (x - Numbers::kZero) * kInversePart;
    }
    if (params.v_zero != nullptr) {
      load_four(v_zero, numbers + 192);
#pragma unroll
      for (float& x : v_zero) x = (x - Numbers::kZero) * kInversePart;
    }
  }

  // Turns products of stored numbers into scores. `factor`, `sum`: of the lane's rows of q.
  __device__ __forceinline__ void scale_scores(const AttentionParams& params, float (&s)[2][4],
                                               const float (&factor)[2],
                                               const float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s[e >> 1][2 * h + (e & 1)];
        if (params.k_zero != nullptr) x = fmaf(-k_zero[e], sum[h], x);
        x *= k_scale[e] * factor[h];
      }
    }
  }

  // What is added to a score before it enters the running maximum.
  __device__ __forceinline__ float log2_v_scale(int e) const {
    return fmaxf(__log2f(fabsf(v_scale[e])), kLeastLog2Scale);
  }

  // Turns probabilities into weights of stored numbers.
  __device__ __forceinline__ void scale_probabilities(float (&p)[2][4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = v_scale[e] * kLargestWeight;
      p[e >> 1][e & 1] *= scale;
      p[e >> 1][2 + (e & 1)] *= scale;
    }
  }

  // Adds the zeros' share of the rounded weights, a first operand of mma, to `offset`.
  __device__ __forceinline__ void add_offsets(float (&offset)[2],
                                              const uint32_t (&weights)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float16 low{static_cast<uint16_t>(weights[i])};
      const Float16 high{static_cast<uint16_t>(weights[i] >> 16)};
      float& x = offset[i & 1];
      x = fmaf(to_float(low), v_zero[i & 2], x);
      x = fmaf(to_float(high), v_zero[(i & 2) + 1], x);
    }
  }

 private:
  static __device__ __forceinline__ void load_four(float (&x)[4], uint32_t numbers) {
    const uint32_t at = numbers + (threadIdx.x & 3) * 8;
    const float2 near = ld_shared_v2(at), far = ld_shared_v2(at + 32);
    x[0] = near.x, x[1] = near.y, x[2] = far.x, x[3] = far.y;
  }
};

// Rows of q, in the form that LaneNumbers takes.
struct QueryNumbers {
  float factor[kDecodeRows];  // values are the fp16 numbers times this
  float sum[kDecodeRows];     // of the fp16 numbers
};

// A power of two that brings numbers up to `largest` below 2^15, and its inverse.
__device__ __forceinline__ float2 to_half_range(float largest) {
  const int exponent = __float_as_uint(largest) >> 23 & 255;
  const int up = min(268 - exponent, 253);
  return {__uint_as_float(static_cast<uint32_t>(up) << 23),
          __uint_as_float(static_cast<uint32_t>(254 - up) << 23)};
}

}  // namespace gqa::cuda::sm80
