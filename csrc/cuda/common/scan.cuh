// Sums over the threads of a CTA.
#pragma once

#include <cstdint>

namespace gqa::cuda {

// The sum of `x` over this thread and those before it. All kThreads threads of the CTA call it.
// `total` receives the sum over all of them. `warp_sums`: shared memory; a barrier must follow
// before it is written again.
template <int kThreads>
__device__ __forceinline__ int scan_threads(int x, int (&warp_sums)[kThreads / 32], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += other;
  }
  if (lane == 31) warp_sums[warp] = x;
  __syncthreads();  // warp_sums
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) x += warp_sums[w];
    total += warp_sums[w];
  }
  return x;
}

}  // namespace gqa::cuda
