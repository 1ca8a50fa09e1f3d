// Merge of the splits of a decode launch, in their order: results do not depend on timing.
//
// Grid   ceil(B * Hq * Sq / 4); a warp merges one row, a lane four neighbouring elements of it.
#pragma once

#include <cstdint>

#include "../../../core/params.h"
#include "../../../core/visible.h"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "config.h"
#include "store.cuh"

namespace gqa::cuda::sm80 {

constexpr int kCombineWarps = 4;

__global__ void __launch_bounds__(kCombineWarps * 32)
    combine_kernel(const __grid_constant__ DecodeParams p) {
  const AttentionParams& a = p.attention;
  const int lane = threadIdx.x & 31;
  const int64_t all_rows = a.batch * a.num_heads * a.q_len;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  if (row >= all_rows) return;
  const int64_t token = row % a.q_len, head = row / a.q_len % a.num_heads;
  const int b = static_cast<int>(row / (a.q_len * a.num_heads));
  const Queries queries = queries_of(a, b);
  if (token >= queries.count) return;
  wait_for_kernel_before();
  int first = b, step = static_cast<int>(a.batch), splits = p.splits;
  if (p.splits == 0) {
    first = p.sequence_parts[2 * b], splits = p.sequence_parts[2 * b + 1], step = 1;
    if (splits == 1) return;  // its CTA has written the results
  }
  const auto partial = [&](int s) {
    return partial_row(a, first + static_cast<int64_t>(s) * step, head, token);
  };

  float larger = minus_infinity();
  for (int s = lane; s < splits; s += 32) {
    larger = fmaxf(larger, p.partial_lse[partial(s)]);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, d));
  float shift = softmax_shift(larger), sum = 0.f;

  constexpr int kVectors = 2;  // 256 elements / 32 lanes / 4
  float4 acc[kVectors] = {};
  for (int s0 = 0; s0 < splits; s0 += 32) {
    const int s = s0 + lane;
    const float weight = s < splits ? exp2_approx(p.partial_lse[partial(s)] - shift) : 0.f;
    sum += weight;  // NaN stays
    const int count = min(32, splits - s0);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float w = __shfl_sync(~0u, weight, i);
      if (!(w > 0.f)) continue;  // a split without keys left its output unwritten
      const float* from = p.partial_out + partial(s0 + i) * p.partial_stride;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int d = v * 128 + lane * 4;
        if (d >= p.partial_stride) continue;
        const float4 x = *reinterpret_cast<const float4*>(from + d);
        acc[v].x = fmaf(w, x.x, acc[v].x), acc[v].y = fmaf(w, x.y, acc[v].y);
        acc[v].z = fmaf(w, x.z, acc[v].z), acc[v].w = fmaf(w, x.w, acc[v].w);
      }
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);

  float factor = 1.f;
  if (a.sinks != nullptr) factor = add_sink(a.sinks[head], shift, sum);
  if (sum != 0.f) factor /= sum;
  uint16_t* out = static_cast<uint16_t*>(a.out) + out_offset(a, queries, head, token);
  const int dim = static_cast<int>(a.value_head_dim);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int d = v * 128 + lane * 4;
    const float4 x = {acc[v].x * factor, acc[v].y * factor, acc[v].z * factor, acc[v].w * factor};
    store_out(out + d, x, dim - d, a.dtype == DType::kBFloat16, p.elements);
  }
  if (lane == 0) a.lse[lse_offset(a, queries, head, token)] = natural_lse(shift, sum);
}

}  // namespace gqa::cuda::sm80
