#include "../instantiate.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Float16, 128>(const DecodeParams&, DecodeVariant,
                                                                cudaStream_t);
