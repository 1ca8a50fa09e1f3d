#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_prefill<gqa::BFloat16, 64>(const PrefillArgs&, bool, unsigned,
                                                                 cudaStream_t);
