#include "launch_kernel.cuh"

namespace gqa::cuda::sm90 {

template void launch_prefill<Float16, 64>(const AttentionParams&, void*, int, cudaStream_t);

}  // namespace gqa::cuda::sm90
