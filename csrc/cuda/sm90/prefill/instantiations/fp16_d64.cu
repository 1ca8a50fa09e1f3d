#include "../instantiate.cuh"

template void gqa::cuda::sm90::launch_prefill<gqa::Float16, 64>(const AttentionParams&, void*, int,
                                                                cudaStream_t);
