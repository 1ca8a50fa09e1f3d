#include "launch_kernel.cuh"

namespace gqa::cuda::sm90 {

template void launch_prefill<BFloat16, 256>(const AttentionParams&, void*, int, cudaStream_t);

}  // namespace gqa::cuda::sm90
