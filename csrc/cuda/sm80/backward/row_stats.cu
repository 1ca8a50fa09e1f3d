// Per-row steps of the backward: before the products, the numbers of each query row; after them,
// the gradients of sinks and ALiBi slopes.
#include <cstdint>

#include "../../../core/params.h"
#include "../../common/mma.cuh"
#include "../../common/ptx.cuh"
#include "../../common/softmax.cuh"
#include "../../common/state.cuh"
#include "../../launch.h"
#include "../shared_tile.cuh"
#include "args.h"
#include "load.cuh"

namespace gqa::cuda::sm80 {

constexpr int kRowLanes = 8;  // of a warp, that take a row together
constexpr int kNumbersThreads = kNumbersBlock * kRowLanes;
constexpr int kSumThreads = 256;

template <class T>
__device__ __forceinline__ uint4 load_chunk(const T* row, int column, int dim, bool elements) {
  return elements ? load_elements(row, column, dim) : ld_global_v4(row + column);
}

// The dot product of eight elements each.
template <class T>
__device__ __forceinline__ float dot_chunk(uint4 x, uint4 y) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int shift = i % 2 * 16;
    sum = fmaf(to_float(T{static_cast<uint16_t>(xs[i / 2] >> shift)}),
               to_float(T{static_cast<uint16_t>(ys[i / 2] >> shift)}), sum);
  }
  return sum;
}

// RowNumbers (FlashAttention-2, section 3.1: delta is there D). One CTA for each (kNumbersBlock
// query tokens, query head, sequence), kRowLanes lanes a row.
template <class T>
__global__ void __launch_bounds__(kNumbersThreads)
    backward_numbers_kernel(const __grid_constant__ BackwardArgs args) {
  const BackwardParams& params = args.params;
  const AttentionParams& call = params.call;
  const uint32_t blocks = static_cast<uint32_t>(args.number_blocks);
  const uint32_t pair = blockIdx.x / blocks, heads = static_cast<uint32_t>(call.num_heads);
  const int b = pair / heads, head = pair % heads;
  const Queries queries = queries_of(call, b);
  const int64_t first_token = blockIdx.x % blocks * kNumbersBlock;
  if (first_token >= queries.count) return;
  const int row = threadIdx.x / kRowLanes, lane = threadIdx.x % kRowLanes;
  const int64_t token = first_token + row;
  const int dim = static_cast<int>(call.value_head_dim);
  float delta = 0.0f;
  if (token < queries.count) {
    const T* out = row_at<T>(call.out, call.out_stride, queries.b, head, queries.first + token);
    const T* dout =
        row_at<T>(params.dout, params.dout_stride, queries.b, head, queries.first + token);
    for (int d = lane * 8; d < dim; d += kRowLanes * 8) {
      delta += dot_chunk<T>(load_chunk(out, d, dim, args.out_elements),
                            load_chunk(dout, d, dim, args.out_elements));
    }
  }
#pragma unroll
  for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2) {
    delta += __shfl_xor_sync(~0u, delta, lanes);
  }
  if (lane != 0) return;
  RowNumbers numbers{-minus_infinity(), 0.0f};
  if (token < queries.count) {
    const int64_t at = lse_offset(call, queries, head, token);
    if (params.dlse != nullptr) delta -= params.dlse[at];
    const float lse = call.lse[at];
    if (lse != minus_infinity()) numbers = {lse * kLog2e, delta};
  }
  args.numbers[first_numbers(args, b) + head * args.padded_len + token] = numbers;
}

// The sum of every thread's number, in a fixed order; thread 0 has it.
__device__ __forceinline__ float sum_of_threads(float x) {
  __shared__ float sums[kSumThreads / 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();  // sums
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSumThreads / 32; ++w) x += sums[w];
  }
  return x;
}

// dsinks: the sums of the kernel for dQ. One CTA for each query head.
__global__ void __launch_bounds__(kSumThreads)
    backward_sinks_kernel(const __grid_constant__ BackwardArgs args) {
  const AttentionParams& call = args.params.call;
  float sum = 0.0f;
  for (int64_t b = 0; b < call.batch; ++b) {
    const HeadSums* sums = args.head_sums + (b * call.num_heads + blockIdx.x) * args.sum_blocks;
    for (int64_t i = threadIdx.x; i < args.sum_blocks; i += kSumThreads) sum += sums[i].sink;
  }
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) args.params.dsinks[blockIdx.x] = sum;
}

// dslopes, likewise. One CTA for each (sequence, query head).
__global__ void __launch_bounds__(kSumThreads)
    backward_slopes_kernel(const __grid_constant__ BackwardArgs args) {
  const HeadSums* sums = args.head_sums + blockIdx.x * args.sum_blocks;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < args.sum_blocks; i += kSumThreads) sum += sums[i].slope;
  sum = sum_of_threads(sum);
  if (threadIdx.x == 0) args.params.dslopes[blockIdx.x] = sum;
}

void launch_numbers(const BackwardArgs& args, unsigned ctas, cudaStream_t stream) {
  const auto kernel = args.params.call.dtype == DType::kBFloat16 ? backward_numbers_kernel<BFloat16>
                                                                 : backward_numbers_kernel<Float16>;
  launch_kernel("sm80 backward, numbers", kernel, dim3(ctas), kNumbersThreads, 0, stream, args);
}

void launch_sinks(const BackwardArgs& args, unsigned ctas, cudaStream_t stream) {
  launch_kernel("sm80 backward, sinks", backward_sinks_kernel, dim3(ctas), kSumThreads, 0, stream,
                args);
}

void launch_slopes(const BackwardArgs& args, unsigned ctas, cudaStream_t stream) {
  launch_kernel("sm80 backward, slopes", backward_slopes_kernel, dim3(ctas), kSumThreads, 0, stream,
                args);
}

}  // namespace gqa::cuda::sm80
