#include "unit.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Float8E4M3, 128>(const DecodeParams&,
                                                                   DecodeVariant, cudaStream_t);
