#include "../instantiate.cuh"

template void gqa::cuda::sm90::launch_prefill<gqa::Float16, 256>(const AttentionParams&, void*, int,
                                                                 cudaStream_t);
