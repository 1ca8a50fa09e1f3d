#include "../../launch.h"
#include "numbers.cuh"

namespace gqa::cuda::sm80 {

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
