// Copies Q's rows of a tile from global to shared memory; four rows per warp, eight lanes each. The
// copy uses registers: with cp.async, waiting for Q would also wait for K and V.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../common/group_rows.cuh"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/state.cuh"
#include "../../common/stored_numbers.cuh"
#include "config.h"
#include "dequantize.cuh"
#include "load.cuh"

namespace gqa::cuda::sm80 {

// Chunk `chunk` (eight elements) of row `r` of the tile; zeros where there is none.
__device__ __forceinline__ uint4 query_chunk(const AttentionParams& a, const Queries& queries,
                                             const GroupRow& row, int chunk, bool elements) {
  const auto [head, token] = row;
  const int available = head < 0 ? 0 : static_cast<int>(a.head_dim) - chunk * 8;
  if (available <= 0) return make_uint4(0, 0, 0, 0);
  const uint16_t* src =
      static_cast<const uint16_t*>(a.q) + q_offset(a, queries, head, token) + chunk * 8;
  if (!elements && available >= 8) return ld_global_v4(src);
  return load_elements<Float16>(reinterpret_cast<const uint8_t*>(src), available * 2);
}

// In q's own type.
template <class C>
__device__ __forceinline__ void load_queries(const AttentionParams& a, const Queries& queries,
                                             const GroupRow* rows, uint32_t s_q, bool elements) {
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 4 + (lane >> 3);
#pragma unroll
  for (int c = 0; c < C::kD / 64; ++c) {
    const int chunk = c * 8 + (lane & 7);
    st_shared_v4(s_q + chunk_offset<C::kQRowBytes>(row, chunk),
                 query_chunk(a, queries, rows[row], chunk, elements));
  }
}

// For products with stored numbers of type S: fp16 numbers, and in the order in which pairs of
// stored numbers come. Lane 4 g + t has of row g of K the 2 N numbers from dim 8 N c + 2 N t on (N
// of a unit, chunk c), and pair i of these is numbers i and N + i. Pairs 2 s and 2 s + 1 are the
// second operand of one mma, whose columns 2 t and 8 + 2 t they must meet.
template <class S, class C>
__device__ __forceinline__ void load_half_queries(const AttentionParams& a, const Queries& queries,
                                                  const GroupRow* rows, uint32_t s_q,
                                                  QueryNumbers& numbers, bool elements) {
  constexpr int kN = StoredNumbers<S>::kPerUnit, kChunks = C::kD / 64;
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 4 + (lane >> 3);
  const bool bf16 = a.dtype == DType::kBFloat16;
  float q[kChunks][8];
  float largest = 0.f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint4 x = query_chunk(a, queries, rows[row], c * 8 + (lane & 7), elements);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      q[c][i] = bf16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
      largest = fmaxf(largest, fabsf(q[c][i]));
    }
  }
#pragma unroll
  for (int d = 4; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
  const auto [up, down] = to_half_range(largest);
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * 8 + (lane & 7);
#pragma unroll
    for (float& x : q[c]) {
      x *= up;
      sum += x;
    }
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      if (m / kN % 2 != 0) continue;  // the second of its pair
      const int i = m % kN, t = (chunk % kN * 8 + m) / (2 * kN);
      const int step = chunk / kN * (kN / 2) + i / 2;
      st_shared_u32(s_q + chunk_offset<C::kQRowBytes>(row, 2 * step + i % 2) + t * 4,
                    pack<Float16>(q[c][m], q[c][m + kN]));
    }
  }
#pragma unroll
  for (int d = 4; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if ((lane & 7) == 0) {
    numbers.factor[row] = down;
    numbers.sum[row] = sum;
  }
}

}  // namespace gqa::cuda::sm80
