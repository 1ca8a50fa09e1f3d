#include "../instantiate.cuh"

template void gqa::cuda::sm90::launch_prefill<gqa::BFloat16, 128>(const AttentionParams&, void*,
                                                                  int, cudaStream_t);
