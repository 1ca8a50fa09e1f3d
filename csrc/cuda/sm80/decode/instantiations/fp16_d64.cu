#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Float16, 64>(const DecodeParams&, DecodeVariant,
                                                               cudaStream_t);
