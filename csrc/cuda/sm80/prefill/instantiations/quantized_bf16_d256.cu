#include "../instantiate_quantized.cuh"

template void gqa::cuda::sm80::launch_quantized_prefill<gqa::BFloat16, 256>(const PrefillArgs&,
                                                                            unsigned, cudaStream_t);
