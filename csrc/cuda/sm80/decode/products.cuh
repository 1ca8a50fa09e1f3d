// The two products of one warp: its 16 rows by 16 keys of a stage.
#pragma once

#include <cstdint>

#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/stored_numbers.cuh"
#include "config.h"
#include "load.cuh"

namespace gqa::cuda::sm80 {

// Q as first operands of mma: in registers, or read from shared memory step by step.
template <class C>
struct QueryOperands {
  static constexpr int kSteps = C::kQInRegisters ? C::kD / 16 : 1;
  uint32_t q[kSteps][4];
  uint32_t s_q;

  __device__ __forceinline__ explicit QueryOperands(uint32_t s_q) : s_q(s_q) {
    if constexpr (C::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) load(i, i);
    }
  }

  // Columns 16 step .. 16 step + 15.
  __device__ __forceinline__ const uint32_t (&at(int step))[4] {
    if constexpr (C::kQInRegisters) return q[step];
    load(0, step);
    return q[0];
  }

 private:
  __device__ __forceinline__ void load(int to, int step) {
    const int lane = threadIdx.x & 31;
    ldmatrix_x4(q[to], s_q + chunk_offset<C::kQRowBytes>(lane & 15, 2 * step + (lane >> 4)));
  }
};

// s += Q K^T, of keys 0-7 and 8-15. S: what K is stored as, T: what the product is of.
template <class T, class S, class C>
__device__ __forceinline__ void multiply_keys(float (&s)[2][4], QueryOperands<C>& queries,
                                              uint32_t s_k) {
  using Numbers = StoredNumbers<S>;
  constexpr int kD = C::kD, kN = Numbers::kPerUnit;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < kD / (16 * kN); ++i) {
    uint32_t b[4], x[2][2][kN];  // of keys 0-7 and 8-15, of two chunks each
    ldmatrix_x4(b, s_k + chunk_offset<C::kRowBytes>(((lane >> 4) << 3) + (lane & 7),
                                                    2 * i + ((lane >> 3) & 1)));
#pragma unroll
    for (int m = 0; m < 4; ++m) Numbers::pairs(b[m], x[m / 2][m % 2]);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int low = 2 * j, high = 2 * j + 1;
      const auto& q = queries.at(i * kN + j);
      mma_16816<T>(s[0], q, x[0][low / kN][low % kN], x[0][high / kN][high % kN]);
      mma_16816<T>(s[1], q, x[1][low / kN][low % kN], x[1][high / kN][high % kN]);
    }
  }
}

// o += P V. `probabilities`: a first operand.
template <class T, class S, class C>
__device__ __forceinline__ void multiply_values(float (&o)[C::kD / 8][4],
                                                const uint32_t (&probabilities)[4], uint32_t s_v) {
  using Numbers = StoredNumbers<S>;
  constexpr int kD = C::kD, kN = Numbers::kPerUnit;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < kD / (16 * kN); ++j) {
    uint32_t b[4], x[4][kN];  // chunk 2 j of keys 0-7 and 8-15, and the next chunk
    ldmatrix_x4_trans(b, s_v + chunk_offset<C::kRowBytes>(lane & 15, 2 * j + (lane >> 4)));
#pragma unroll
    for (int m = 0; m < 4; ++m) Numbers::pairs(b[m], x[m]);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      mma_16816<T>(o[2 * j * kN + i], probabilities, x[0][i], x[1][i]);
      mma_16816<T>(o[(2 * j + 1) * kN + i], probabilities, x[2][i], x[3][i]);
    }
  }
}

}  // namespace gqa::cuda::sm80
