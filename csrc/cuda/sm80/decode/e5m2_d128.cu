#include "unit.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Float8E5M2, 128>(const DecodeParams&,
                                                                   DecodeVariant, cudaStream_t);
