#include "../instantiate_quantized.cuh"

template void gqa::cuda::sm80::launch_quantized_prefill<gqa::Float16, 128>(const PrefillArgs&,
                                                                           unsigned, cudaStream_t);
