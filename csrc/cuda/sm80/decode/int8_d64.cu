#include "unit.cuh"

template void gqa::cuda::sm80::launch_decode<gqa::Int8, 64>(const DecodeParams&, DecodeVariant,
                                                            cudaStream_t);
