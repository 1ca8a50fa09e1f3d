// End of an output tile: O is normalised and goes through shared memory to TMA, which drops rows
// beyond Sq and columns beyond Dv; the log-sum-exp goes straight to global memory. TMA can't stop
// where one of several packed sequences ends: its last rows are stored by the threads.
#pragma once

#include "../../common/mma.cuh"
#include "../../common/state.cuh"
#include "../barrier.cuh"
#include "../tma.cuh"
#include "scores.cuh"

namespace gqa::cuda::sm90 {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// What the rows of a thread are multiplied by; writes their log-sum-exp.
__device__ __forceinline__ void finish_rows(const AttentionParams& params, int k_head,
                                            const Rows& rows, const OnlineSoftmax& softmax,
                                            float factor, float (&inverse)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const KeyRange seen = keys_around(params, rows.length, rows.position + 8 * h);
    const bool valid = k_head >= 0 || (k_head == kNoPage && seen.begin >= seen.end);
    float sum = quad_sum(softmax.sum[h]);
    float shift = softmax_shift(softmax.maximum[h]) * factor;
    float weight = 1.0f;
    if (params.sinks != nullptr) weight = add_sink(params.sinks[rows.head], shift, sum);
    // A row that sees no key gives 0 and -inf.
    inverse[h] = !valid ? not_a_number() : sum == 0.0f ? 0.0f : weight / sum;
    const int token = rows.token + 8 * h;
    if (threadIdx.x % 4 == 0 && token < rows.q_len) {
      const int64_t row = rows.batch * params.num_heads + rows.head;
      params.lse[row * params.q_tokens + rows.token0 + token] =
          valid ? natural_lse(shift, sum) : not_a_number();
    }
  }
}

// The first `count` rows of O of a consumer, from shared memory to global memory.
template <class C>
__device__ __forceinline__ void store_rows(const AttentionParams& params, const Rows& rows,
                                           int row0, int count, uint32_t o_rows) {
  const int dim = static_cast<int>(params.value_head_dim), chunks = (dim + 7) / 8;
  uint16_t* out = static_cast<uint16_t*>(params.out) + rows.head * params.out_stride.h +
                  int64_t{rows.token0 + row0} * params.out_stride.s;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < count * chunks; i += 128) {
    const int row = i / chunks, chunk = i % chunks, columns = min(8, dim - 8 * chunk);
    // A consumer's first row is a multiple of 8, so the swizzle is that of its own rows.
    const uint4 x = ld_shared_v4u(o_rows + chunk / 8 * C::kQPanel + row * kPanelBytes +
                                  ((chunk % 8 ^ row % 8) << 4));
    uint16_t* to = out + row * params.out_stride.s + 8 * chunk;
    if (columns == 8) {
      *reinterpret_cast<uint4*>(to) = x;
    } else {
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int c = 0; c < 8; c++) {
        if (c < columns) to[c] = static_cast<uint16_t>(pairs[c / 2] >> 16 * (c % 2));
      }
    }
  }
}

// `row0`: the consumer's first token; `consumer`: 0, 1, ...; `barrier`: a named barrier of this consumer's own.
template <class T, class C>
__device__ __forceinline__ void store_output(const PrefillArguments& arguments, const Rows& rows,
                                             int row0, const float (&o)[C::kHeadDim / 2],
                                             const float (&inverse)[2], uint32_t base, int consumer,
                                             int barrier) {
  const bool storer = threadIdx.x % 128 == 0;
  if (storer) tma_store_wait_read();  // the previous tile's O has left the buffer
  named_barrier_sync(barrier, 128);
  const int lane = threadIdx.x % 32;
  const int row = 64 * consumer + threadIdx.x / 32 % 4 * 16 + lane % 16;
  const uint32_t o_row = base + C::kO + row * kPanelBytes;
#pragma unroll
  for (int j = 0; j < C::kHeadDim / 16; j++) {
    const int chunk = 2 * j + lane / 16;  // of 8 columns
    const float* x = o + 8 * j;
    stmatrix_x4(o_row + chunk / 8 * C::kQPanel + ((chunk % 8 ^ row % 8) << 4),
                pack<T>(x[0] * inverse[0], x[1] * inverse[0]),
                pack<T>(x[2] * inverse[1], x[3] * inverse[1]),
                pack<T>(x[4] * inverse[0], x[5] * inverse[0]),
                pack<T>(x[6] * inverse[1], x[7] * inverse[1]));
  }
  fence_async_proxy();
  named_barrier_sync(barrier, 128);
  const AttentionParams& params = arguments.attention;
  const uint32_t o_rows = base + C::kO + consumer * 64 * kPanelBytes;
  if (params.q_offsets != nullptr && row0 + 64 > rows.q_len) {
    store_rows<C>(params, rows, row0, max(0, rows.q_len - row0), o_rows);
    // This must come before Q or the next O is written to the buffer.
    if constexpr (!C::kOwnO) named_barrier_sync(barrier, 128);
  } else if (storer && row0 < rows.q_len) {
#pragma unroll
    for (int c = 0; c < C::kPanels; c++) {
      if (c * 64 >= params.value_head_dim) break;
      tma_store(&arguments.out, o_rows + c * C::kQPanel, c * 64, rows.token0 + row0, rows.head,
                rows.batch);
    }
    tma_store_commit();
  }
}

}  // namespace gqa::cuda::sm90
