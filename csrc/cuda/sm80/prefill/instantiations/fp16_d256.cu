#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_prefill<gqa::Float16, 256>(const PrefillArgs&, bool, unsigned,
                                                                 cudaStream_t);
