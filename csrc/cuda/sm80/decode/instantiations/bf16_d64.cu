#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::BFloat16, 64>(const DecodeParams&, DecodeVariant,
                                                                cudaStream_t);
